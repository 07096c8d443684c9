//! A pair of mounted files that somebody else replaces.
//!
//! Polled, not watched: kubelet replaces a Secret volume by swapping the symlink `..data`, so the files themselves are
//! never written, and a watch on them sees nothing but its own end. A swap can fall between the two reads, so the
//! certificate is read again after the key, and if it changed, so is everything.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;

use crate::{Error, Pair, Serving};

/// Certificate and key, as read.
type Bytes = (Vec<u8>, Vec<u8>);

/// What a poll found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Polled {
    /// The files hold what is served.
    Unchanged,
    /// A new pair is served.
    Swapped,
    /// A new pair is there and waits until it may be served.
    Held,
    /// The files hold something that can't be served; the old pair stays.
    Refused(Error),
}

/// Two files, and the [`Serving`] that follows them. Poll it at least every 10 s.
#[derive(Debug)]
pub struct FilePair {
    certificate: PathBuf,
    key: PathBuf,
    serving: Arc<Serving>,
    served: Option<Bytes>,
    refused: Option<Error>,
}

impl FilePair {
    /// The files' names: a PEM chain with the leaf first, and its key. Nothing is read yet.
    pub fn new(certificate: impl Into<PathBuf>, key: impl Into<PathBuf>, serving: Arc<Serving>) -> Self {
        Self { certificate: certificate.into(), key: key.into(), serving, served: None, refused: None }
    }

    /// Reads both files; serves them if they are new, belong together, are valid at `now`, and `may_serve` them. Reads block for
    /// a moment.
    pub fn poll(&mut self, now: Timestamp, may_serve: impl FnOnce(&Pair) -> bool) -> Polled {
        match self.load(now) {
            Ok(Some((_, pair))) if !may_serve(&pair) => {
                self.refused = None;
                Polled::Held
            }
            Ok(None) => {
                if self.refused.take().is_some() {
                    self.serving.recovered();
                }
                Polled::Unchanged
            }
            Ok(Some((bytes, pair))) => {
                tracing::info!(not_after = %pair.not_after, file = %self.certificate.display(), "serving a new certificate");
                self.serving.swap(pair);
                self.served = Some(bytes);
                self.refused = None;
                Polled::Swapped
            }
            Err(error) => {
                // Told once, not at each poll.
                if self.refused.as_ref() != Some(&error) {
                    tracing::error!(%error, file = %self.certificate.display(), "the new certificate is not served, the old one stays");
                    self.serving.failed(&error);
                    self.refused = Some(error.clone());
                }
                Polled::Refused(error)
            }
        }
    }

    fn load(&self, now: Timestamp) -> Result<Option<(Bytes, Pair)>, Error> {
        let mut bytes = (read(&self.certificate)?, read(&self.key)?);
        for _ in 0..3 {
            let again = read(&self.certificate)?;
            if again == bytes.0 {
                break;
            }
            bytes = (again, read(&self.key)?);
        }
        if self.served.as_ref() == Some(&bytes) {
            return Ok(None);
        }
        let pair = Pair::from_pem(&bytes.0, &bytes.1)?;
        pair.check_dates(now)?;
        Ok(Some((bytes, pair)))
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path)
        .map_err(|e| Error::Unreadable { path: path.display().to_string(), cause: e.to_string() })
}
