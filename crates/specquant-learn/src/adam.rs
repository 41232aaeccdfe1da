//! Adam, the optimizer of OmniQuant and of tuning: torch's `AdamW` with no weight decay.

/// Moments of one parameter tensor.
pub(crate) struct Adam {
    lr: f64,
    steps: i32,
    mean: Vec<f64>,
    square: Vec<f64>,
}

impl Adam {
    /// torch's defaults.
    const BETAS: (f64, f64) = (0.9, 0.999);
    const EPS: f64 = 1e-8;

    /// For `len` parameters.
    pub fn new(lr: f64, len: usize) -> Self {
        Adam { lr, steps: 0, mean: vec![0.0; len], square: vec![0.0; len] }
    }

    /// First and second moments.
    pub fn moments(&self) -> impl Iterator<Item = f64> {
        self.mean.iter().chain(&self.square).copied()
    }

    /// As it was behind `steps` steps. moments: of [`Adam::moments`].
    pub fn restore(&mut self, steps: usize, moments: &[f64]) {
        self.steps = steps as i32;
        self.mean.iter_mut().chain(&mut self.square).zip(moments).for_each(|(to, v)| *to = *v);
    }

    /// One step at `rate` of the learning rate. params, gradient: of the length given to [`Adam::new`].
    pub fn step(&mut self, rate: f64, params: &mut [f32], gradient: &[f32]) {
        let (b1, b2) = Self::BETAS;
        self.steps += 1;
        let (c1, c2) = (1.0 - b1.powi(self.steps), 1.0 - b2.powi(self.steps));
        let moments = self.mean.iter_mut().zip(&mut self.square);
        for ((p, &g), (m, v)) in params.iter_mut().zip(gradient).zip(moments) {
            let g = f64::from(g);
            *m = b1 * *m + (1.0 - b1) * g;
            *v = b2 * *v + (1.0 - b2) * g * g;
            *p -= (rate * self.lr * (*m / c1) / ((*v / c2).sqrt() + Self::EPS)) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_step_is_the_learning_rate_and_a_parabola_is_descended() {
        let (mut adam, mut p) = (Adam::new(0.1, 2), [1.0, -3.0]);
        adam.step(1.0, &mut p, &[2.0, -6.0]);
        // With bias correction, m / √v of the first step is the gradient's sign.
        assert!((p[0] - 0.9).abs() < 1e-6 && (p[1] + 2.9).abs() < 1e-6, "{p:?}");
        for _ in 0..200 {
            let g = p.map(|p| 2.0 * p);
            adam.step(1.0, &mut p, &g);
        }
        assert!(p.iter().all(|p| p.abs() < 0.05), "{p:?}");
    }
}
