//! The roofline: how near the products come to what arithmetic and memory allow.

use specquant_eval::svg::{Axis, Points, Series, plane};

use crate::{Product, Report};

/// Operations a second over operations for every byte of weights read (Williams et al., Roofline, CACM 52, 2009), as an SVG file.
pub fn roofline(report: &Report) -> String {
    let intensity = |product: Product, rows: usize| 2.0 * rows as f64 / product.weight_bytes();
    let shown = [Product::F32, Product::W4A4, Product::W4A4Levels, Product::W8A8];
    let rows = || report.products.iter().filter(|r| shown.contains(&r.product));
    let x = Axis::around(rows().map(|r| intensity(r.product, r.rows)), true);
    let machine = &report.machine;
    let roof = |top: f64, at: f64| top.min(machine.read_gbs * at);
    let marks: Vec<f64> = (0..=60).map(|i| 10f64.powf(-0.5 + f64::from(i) / 12.0)).collect();
    let roofs = [("int8 limit", machine.int8_gops), ("f32 limit", machine.f32_gflops)];
    // Room for the name above the highest.
    let y = Axis::around(rows().map(super::ProductRow::gops).chain(roofs.map(|(_, top)| 2.0 * top)), true);
    let mut series: Vec<Series> = roofs
        .into_iter()
        .map(|(label, top)| Series {
            series: 0,
            points: marks.iter().map(|&at| (at, roof(top, at), String::new())).collect(),
            label: label.to_owned(),
            drawn: Points::Line,
        })
        .collect();
    series.extend(shown.into_iter().enumerate().map(|(i, product)| {
        Series {
            series: i + 1,
            points: rows()
                .filter(|r| r.product == product)
                .map(|r| {
                    let title = format!(
                        "{} {} x {} x {}: {:.0} GOP/s",
                        product.name(),
                        r.rows,
                        r.inp,
                        r.out,
                        r.gops()
                    );
                    (intensity(product, r.rows), r.gops(), title)
                })
                .collect(),
            label: String::new(),
            drawn: Points::Loose,
        }
    }));
    let titles = ("operations for each byte of weights", "10⁹ operations a second");
    let legend: Vec<&str> = std::iter::once("limit").chain(shown.map(Product::name)).collect();
    plane(&series, &x, &y, titles, "Roofline of the products").standalone(&legend)
}
