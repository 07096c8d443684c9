//! Certificates of the webhook: where the key pair comes from, and how it is replaced without a failed request.
//!
//! Everything that decides is a function of values and the time that the caller passes in; there is no Kubernetes client
//! and no timer in here.
//!
//! - [`Serving`] holds the pair that new handshakes get; [`server_config`] makes a rustls server from it.
//! - [`FilePair`] keeps a `Serving` in step with two mounted files (modes `files` and `cert-manager`).
//! - [`Bundles`] says what configurations should trust where the authority is in a file.
//! - [`SelfSigned`] keeps it in step with an authority that all replicas share in a Secret (mode `self`). Its
//!   [`step`](SelfSigned::step) says what to write and publish.

mod authority;
mod files;
mod rotation;
mod serving;
mod trust;

pub use authority::{Authority, Leaf, Reason, service_names};
pub use files::{FilePair, Polled};
pub use rotation::{Decision, Lifetimes, SecretData, SelfSigned, Step, Write, decide};
pub use serving::{Pair, Serving, State, server_config};
pub use trust::{Bundles, is_trusted};

/// What went wrong with a certificate or key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A file that can't be read.
    #[error("{path} can't be read: {cause}")]
    Unreadable {
        /// The file.
        path: String,
        /// What the operating system says.
        cause: String,
    },
    /// Text that holds no certificate or no key.
    #[error("{what} holds no usable {wanted}: {cause}")]
    Malformed {
        /// The file or Secret key.
        what: String,
        /// `certificate` or `private key`.
        wanted: &'static str,
        /// What the parser says.
        cause: String,
    },
    /// The key isn't the first certificate's.
    #[error("the private key does not belong to the first certificate of the chain")]
    Mismatch,
    /// The pair's time is over.
    #[error("the certificate expired at {0}")]
    Expired(jiff::Timestamp),
    /// The pair's time has not come.
    #[error("the certificate is not valid before {0}")]
    NotYetValid(jiff::Timestamp),
    /// A certificate that may sign nothing, where an authority is needed.
    #[error("the certificate is not one of an authority")]
    NotAnAuthority,
    /// Lifetimes that don't fit each other.
    #[error("a third of the authority's lifetime must be longer than settling and retention together")]
    Lifetimes,
    /// A certificate could not be made.
    #[error("can't make a certificate: {0}")]
    Issue(String),
}
