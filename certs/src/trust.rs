//! The trust of API servers: a test that they take a chain, and the bundles that they should get.

use std::collections::HashMap;
use std::time::Duration;

use jiff::Timestamp;
use rustls::RootCertStore;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::ParsedCertificate;

use crate::authority::{pem, read_bundle, validity};

/// The time that another authority stays in a bundle after it was first seen there: replicas that serve leaves of it end, or read
/// their new files, in minutes.
const KEPT: Duration = Duration::from_secs(3600);

/// True if an API server with this `caBundle` (PEM) takes the chain (leaf first); names are not looked at. Like the API server,
/// it takes a leaf that is itself in the bundle.
pub fn is_trusted(chain: &[CertificateDer<'static>], bundle: &[u8], now: Timestamp) -> bool {
    let Some((leaf, rest)) = chain.split_first() else { return false };
    let anchors = read_bundle(bundle);
    if anchors.contains(leaf) {
        return validity(leaf).is_ok_and(|(from, to)| from <= now && now < to);
    }
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(anchors);
    let Ok(leaf) = ParsedCertificate::try_from(leaf) else { return false };
    let now =
        UnixTime::since_unix_epoch(Duration::from_secs(u64::try_from(now.as_second()).unwrap_or_default()));
    let algorithms = rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.all;
    verify_server_cert_signed_by_trust_anchor(&leaf, &roots, rest, now, algorithms).is_ok()
}

/// The bundles of configurations whose authority is in a file: it, and for a while those that were there.
#[derive(Debug, Default)]
pub struct Bundles(HashMap<CertificateDer<'static>, Timestamp>);

impl Bundles {
    /// The bundle (PEM) that a configuration should get; `None`: it has the right one, or there is no `authority` (PEM).
    pub fn wanted(&mut self, authority: &[u8], there: Option<&[u8]>, now: Timestamp) -> Option<String> {
        let authority = read_bundle(authority);
        if authority.is_empty() {
            return None;
        }
        let mut there = there.map(read_bundle).unwrap_or_default();
        let mut wanted = authority;
        for other in there.iter().filter(|other| !wanted.contains(other)).cloned().collect::<Vec<_>>() {
            let since = *self.0.entry(other.clone()).or_insert(now);
            let is_kept = since.checked_add(KEPT).is_ok_and(|end| now < end);
            if is_kept && validity(&other).is_ok_and(|(_, end)| now < end) {
                wanted.push(other);
            }
        }
        for bundle in [&mut wanted, &mut there] {
            bundle.sort_by(|a, b| a.as_ref().cmp(b.as_ref()));
            bundle.dedup();
        }
        (wanted != there).then(|| wanted.iter().map(pem).collect())
    }
}
