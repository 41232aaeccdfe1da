//! Data sets from the Hugging Face hub, as the parquet files into which the hub converts every data set.

use std::io::Write;
use std::path::Path;

use super::{Dataset, Task};
use crate::results::write_whole;
use crate::{Error, Result};

/// More than any of the data sets has.
const MOST_BYTES: u64 = 512 << 20;

/// Where to download from.
#[derive(Debug, Clone)]
pub struct Hub {
    /// Address of the hub or of a mirror, without a slash at the end.
    pub endpoint: String,
    /// Access token, for data sets that ask for one.
    pub token: Option<String>,
}

impl Hub {
    /// `$HF_ENDPOINT`, else huggingface.co; `$HF_TOKEN` if set.
    pub fn from_env() -> Hub {
        let endpoint = std::env::var("HF_ENDPOINT").unwrap_or_else(|_| "https://huggingface.co".to_owned());
        Hub { endpoint: endpoint.trim_end_matches('/').to_owned(), token: std::env::var("HF_TOKEN").ok() }
    }
}

impl Task {
    /// Downloads the task's data to `DIR/FILE.parquet`.
    ///
    /// # Errors
    /// [`Error::Download`] with the address and what the server said; [`Error::Io`].
    pub fn download(&self, dir: &Path, hub: &Hub) -> Result<()> {
        let Dataset { path, config, split } = &self.dataset;
        let url = format!(
            "{}/datasets/{path}/resolve/refs%2Fconvert%2Fparquet/{config}/{split}/0000.parquet",
            hub.endpoint
        );
        let fail = |cause: ureq::Error| Error::Download { url: url.clone(), cause: cause.to_string() };
        let mut request = ureq::get(&url);
        if let Some(token) = &hub.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        let mut response = request.call().map_err(fail)?;
        let bytes = response.body_mut().with_config().limit(MOST_BYTES).read_to_vec().map_err(fail)?;
        std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
        write_whole(&dir.join(format!("{}.parquet", self.file)), |file| file.write_all(&bytes))
    }
}
