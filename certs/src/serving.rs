//! The pair that new handshakes get, swapped as a whole.

use std::sync::Arc;

use arc_swap::{ArcSwap, ArcSwapOption};
use jiff::Timestamp;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{InconsistentKeys, ServerConfig};

use crate::Error;
use crate::authority::validity;

/// A certificate chain and its key, known to belong together.
#[derive(Debug, Clone)]
pub struct Pair {
    key: Arc<CertifiedKey>,
    /// The latest `notBefore` of the chain.
    pub not_before: Timestamp,
    /// The earliest `notAfter` of the chain.
    pub not_after: Timestamp,
}

impl Pair {
    /// Reads a chain (leaf first) and a key (PKCS #8, PKCS #1 or SEC 1) from PEM.
    ///
    /// # Errors
    /// When either can't be read, or they don't belong together. Dates are not looked at: see [`Pair::check_dates`].
    pub fn from_pem(chain: &[u8], key: &[u8]) -> Result<Self, Error> {
        let malformed =
            |what: &str, wanted, cause: String| Error::Malformed { what: what.to_owned(), wanted, cause };
        let chain = CertificateDer::pem_slice_iter(chain)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| malformed("the certificate file", "certificate", e.to_string()))?;
        if chain.is_empty() {
            return Err(malformed("the certificate file", "certificate", "no CERTIFICATE block".to_owned()));
        }
        let key = PrivateKeyDer::from_pem_slice(key)
            .map_err(|e| malformed("the key file", "private key", e.to_string()))?;
        Self::new(chain, key)
    }

    /// As [`Pair::from_pem`], from DER.
    ///
    /// # Errors
    /// As [`Pair::from_pem`].
    pub fn new(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Result<Self, Error> {
        let mut dates: Option<(Timestamp, Timestamp)> = None;
        for certificate in &chain {
            let (from, to) = validity(certificate)?;
            dates = Some(dates.map_or((from, to), |(f, t)| (f.max(from), t.min(to))));
        }
        let (not_before, not_after) = dates.ok_or_else(|| Error::Malformed {
            what: "the chain".to_owned(),
            wanted: "certificate",
            cause: "it is empty".to_owned(),
        })?;
        let signer = rustls::crypto::aws_lc_rs::sign::any_supported_type(&key).map_err(|e| {
            Error::Malformed { what: "the key file".to_owned(), wanted: "private key", cause: e.to_string() }
        })?;
        let key = CertifiedKey::new(chain, signer);
        match key.keys_match() {
            // `Unknown`: a signer that doesn't tell its public key; the handshake will show.
            Ok(()) | Err(rustls::Error::InconsistentKeys(InconsistentKeys::Unknown)) => {}
            Err(rustls::Error::InconsistentKeys(_)) => return Err(Error::Mismatch),
            Err(e) => {
                return Err(Error::Malformed {
                    what: "the certificate file".to_owned(),
                    wanted: "certificate",
                    cause: e.to_string(),
                });
            }
        }
        Ok(Self { key: Arc::new(key), not_before, not_after })
    }

    /// Whether the whole chain is valid at `now`.
    ///
    /// # Errors
    /// [`Error::Expired`] or [`Error::NotYetValid`].
    pub fn check_dates(&self, now: Timestamp) -> Result<(), Error> {
        if now >= self.not_after {
            Err(Error::Expired(self.not_after))
        } else if now < self.not_before {
            Err(Error::NotYetValid(self.not_before))
        } else {
            Ok(())
        }
    }

    /// The chain, leaf first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.key.cert
    }
}

/// What `/readyz`, metrics and logs tell about the served pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// End of the served pair (metric `tgb_certificate_not_after_seconds`); `None` while there is none.
    pub not_after: Option<Timestamp>,
    /// Why the newest pair is not the served one; `None` after a success.
    pub last_error: Option<Error>,
    /// Pairs served so far, the first one included.
    pub swaps: u64,
    /// Times that a new pair was refused or could not be read.
    pub failures: u64,
}

impl State {
    /// Whether handshakes succeed with clients that trust the issuer: there is a pair, and it is not over.
    /// An error of the *next* pair doesn't count: one bad rotation must not take all replicas out at once.
    pub fn is_valid(&self, now: Timestamp) -> bool {
        self.not_after.is_some_and(|end| now < end)
    }
}

/// The pair that new handshakes get. Connections that are open keep theirs.
#[derive(Debug)]
pub struct Serving {
    pair: ArcSwapOption<Pair>,
    state: ArcSwap<State>,
}

impl Default for Serving {
    fn default() -> Self {
        let state = State { not_after: None, last_error: None, swaps: 0, failures: 0 };
        Self { pair: ArcSwapOption::empty(), state: ArcSwap::from_pointee(state) }
    }
}

impl Serving {
    /// Serves this pair from the next handshake on.
    pub fn swap(&self, pair: Pair) {
        let not_after = Some(pair.not_after);
        self.pair.store(Some(Arc::new(pair)));
        self.state.rcu(|s| State {
            not_after,
            last_error: None,
            swaps: s.swaps.saturating_add(1),
            failures: s.failures,
        });
    }

    /// Remembers why there is no newer pair; the served one stays.
    pub fn failed(&self, error: &Error) {
        self.state.rcu(|s| State {
            last_error: Some(error.clone()),
            failures: s.failures.saturating_add(1),
            ..State::clone(s)
        });
    }

    /// Forgets the error of a newer pair that is no longer there.
    pub fn recovered(&self) {
        self.state.rcu(|s| State { last_error: None, ..State::clone(s) });
    }

    /// What to tell about it.
    pub fn state(&self) -> State {
        State::clone(&self.state.load())
    }

    /// The served pair.
    pub fn pair(&self) -> Option<Arc<Pair>> {
        self.pair.load_full()
    }
}

impl ResolvesServerCert for Serving {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.pair.load().as_ref().map(|pair| Arc::clone(&pair.key))
    }
}

/// A TLS server for the API server: TLS 1.2 and 1.3, ALPN `h2` and `http/1.1`, no client certificates, aws-lc-rs.
///
/// # Errors
/// Never with the provider that is built in; rustls says it can.
pub fn server_config(serving: Arc<Serving>) -> Result<ServerConfig, Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .map_err(|e| Error::Issue(e.to_string()))?
        .with_no_client_auth()
        .with_cert_resolver(serving);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}
