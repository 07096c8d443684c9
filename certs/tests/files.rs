//! Mounted files: what kubelet, cert-manager and people do to them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)] // helpers of tests are tests

use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tgb_certs::{Bundles, Error, FilePair, Pair, Polled, Serving, is_trusted};

const DAY: Duration = Duration::from_secs(86_400);

fn now() -> Timestamp {
    "2026-06-01T00:00:00Z".parse().unwrap()
}

/// A self-signed pair, valid from `from` days to `to` days after `now`.
fn pair(from: i32, to: i32) -> (String, String) {
    let key = KeyPair::generate().unwrap();
    let params = params(from, to);
    (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
}

fn params(from: i32, to: i32) -> CertificateParams {
    let mut params = CertificateParams::new(vec!["tgb-webhook.tgb-system.svc".to_owned()]).unwrap();
    let date = |days: i32| {
        let base = rcgen::date_time_ymd(2026, 6, 1);
        if days < 0 { base - DAY * days.unsigned_abs() } else { base + DAY * days.unsigned_abs() }
    };
    params.not_before = date(from);
    params.not_after = date(to);
    params
}

/// A Secret volume as kubelet makes it: `tls.crt` → `..data/tls.crt`, `..data` → a directory per version.
struct Volume {
    dir: tempfile::TempDir,
    version: u32,
}

impl Volume {
    fn new(pair: &(String, String)) -> Self {
        let mut volume = Self { dir: tempfile::tempdir().unwrap(), version: 0 };
        volume.replace(pair);
        for name in ["tls.crt", "tls.key"] {
            symlink(Path::new("..data").join(name), volume.path(name)).unwrap();
        }
        volume
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a new directory and renames a new symlink over `..data`, then removes the old directory.
    fn replace(&mut self, (certificate, key): &(String, String)) {
        let old = self.path(&format!("..{}", self.version));
        self.version += 1;
        let fresh = format!("..{}", self.version);
        std::fs::create_dir(self.path(&fresh)).unwrap();
        std::fs::write(self.path(&fresh).join("tls.crt"), certificate).unwrap();
        std::fs::write(self.path(&fresh).join("tls.key"), key).unwrap();
        symlink(&fresh, self.path("..data_tmp")).unwrap();
        std::fs::rename(self.path("..data_tmp"), self.path("..data")).unwrap();
        let _ = std::fs::remove_dir_all(old);
    }

    fn follow(&self) -> (FilePair, Arc<Serving>) {
        let serving = Arc::new(Serving::default());
        (FilePair::new(self.path("tls.crt"), self.path("tls.key"), Arc::clone(&serving)), serving)
    }
}

fn any(_: &Pair) -> bool {
    true
}

/// An authority, and a pair that it signed.
fn signed() -> (String, (String, String)) {
    let key = KeyPair::generate().unwrap();
    let mut authority = params(-1, 30);
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority
        .distinguished_name
        .push(rcgen::DnType::CommonName, format!("ca {:?}", key.public_key_raw().get(..8)));
    let certificate = authority.self_signed(&key).unwrap();
    let issuer = Issuer::from_ca_cert_der(certificate.der(), &key).unwrap();
    let leaf = KeyPair::generate().unwrap();
    let signed = params(-1, 30).signed_by(&leaf, &issuer).unwrap();
    (certificate.pem(), (signed.pem(), leaf.serialize_pem()))
}

fn chain((certificate, key): &(String, String)) -> Pair {
    Pair::from_pem(certificate.as_bytes(), key.as_bytes()).unwrap()
}

fn served(serving: &Serving) -> Vec<u8> {
    serving.pair().unwrap().chain()[0].to_vec()
}

#[test]
fn the_symlink_swap_of_kubelet_is_seen_twice_in_a_row() {
    let mut volume = Volume::new(&pair(-1, 30));
    let (mut files, serving) = volume.follow();
    assert_eq!(files.poll(now(), any), Polled::Swapped);
    let mut seen = vec![served(&serving)];
    for _ in 0..2 {
        volume.replace(&pair(-1, 30));
        assert_eq!(files.poll(now(), any), Polled::Swapped);
        assert_eq!(files.poll(now(), any), Polled::Unchanged);
        seen.push(served(&serving));
    }
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 3);
    assert_eq!(serving.state().swaps, 3);
}

#[test]
fn a_key_of_another_certificate_keeps_the_old_pair() {
    let mut volume = Volume::new(&pair(-1, 30));
    let (mut files, serving) = volume.follow();
    files.poll(now(), any);
    let before = served(&serving);
    volume.replace(&(pair(-1, 30).0, pair(-1, 30).1));
    assert_eq!(files.poll(now(), any), Polled::Refused(Error::Mismatch));
    assert_eq!(served(&serving), before);
    let state = serving.state();
    assert_eq!((state.last_error.clone(), state.failures), (Some(Error::Mismatch), 1));
    assert!(state.is_valid(now()), "one bad rotation must not make it unready");
    files.poll(now(), any);
    assert_eq!(serving.state().failures, 1, "the same error counts once");
    volume.replace(&pair(-1, 30));
    assert_eq!(files.poll(now(), any), Polled::Swapped);
    assert_eq!(serving.state().last_error, None);
}

#[test]
fn a_bad_pair_that_is_taken_back_leaves_no_error_behind() {
    let good = pair(-1, 30);
    let mut volume = Volume::new(&good);
    let (mut files, serving) = volume.follow();
    files.poll(now(), any);
    volume.replace(&("".to_owned(), "".to_owned()));
    assert!(matches!(files.poll(now(), any), Polled::Refused(Error::Malformed { .. })));
    volume.replace(&good);
    assert_eq!(files.poll(now(), any), Polled::Unchanged);
    assert_eq!(serving.state().last_error, None);
}

#[test]
fn an_expired_pair_keeps_the_old_one() {
    let mut volume = Volume::new(&pair(-1, 30));
    let (mut files, serving) = volume.follow();
    files.poll(now(), any);
    let before = served(&serving);
    volume.replace(&pair(-30, -1));
    assert!(matches!(files.poll(now(), any), Polled::Refused(Error::Expired(_))));
    assert_eq!(served(&serving), before);
}

#[test]
fn a_pair_that_is_not_valid_yet_is_served_when_its_time_comes() {
    let mut volume = Volume::new(&pair(-1, 30));
    let (mut files, serving) = volume.follow();
    files.poll(now(), any);
    volume.replace(&pair(2, 60));
    assert!(matches!(files.poll(now(), any), Polled::Refused(Error::NotYetValid(_))));
    assert_eq!(files.poll(now() + DAY * 3, any), Polled::Swapped);
    assert_eq!(serving.state().not_after, Some(now() + DAY * 60));
}

#[test]
fn a_served_pair_that_runs_out_is_no_longer_valid() {
    let volume = Volume::new(&pair(-1, 30));
    let (mut files, serving) = volume.follow();
    files.poll(now(), any);
    assert!(serving.state().is_valid(now() + DAY * 29));
    assert!(!serving.state().is_valid(now() + DAY * 30));
}

#[test]
fn a_chain_with_an_intermediate_is_served_whole_and_ends_with_its_first_end() {
    let authority_key = KeyPair::generate().unwrap();
    let mut authority = params(-1, 10);
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority_pem = authority.self_signed(&authority_key).unwrap().pem();
    let issuer = Issuer::from_params(&authority, &authority_key);
    let key = KeyPair::generate().unwrap();
    let leaf = params(-1, 30).signed_by(&key, &issuer).unwrap().pem();

    let volume = Volume::new(&(format!("{leaf}{authority_pem}"), key.serialize_pem()));
    let (mut files, serving) = volume.follow();
    assert_eq!(files.poll(now(), any), Polled::Swapped);
    assert_eq!(serving.pair().unwrap().chain().len(), 2);
    assert_eq!(serving.state().not_after, Some(now() + DAY * 10));

    // The wrong way round, the key belongs to the second certificate.
    let volume = Volume::new(&(format!("{authority_pem}{leaf}"), key.serialize_pem()));
    let (mut files, _) = volume.follow();
    assert_eq!(files.poll(now(), any), Polled::Refused(Error::Mismatch));
}

#[test]
fn a_missing_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let serving = Arc::new(Serving::default());
    let mut files =
        FilePair::new(dir.path().join("tls.crt"), dir.path().join("tls.key"), Arc::clone(&serving));
    let Polled::Refused(error) = files.poll(now(), any) else { panic!("nothing to serve") };
    assert!(error.to_string().contains("tls.crt"), "{error}");
    assert!(!serving.state().is_valid(now()));
}

#[test]
fn a_pair_that_may_not_be_served_yet_waits_and_the_old_one_stays() {
    let mut volume = Volume::new(&pair(-1, 30));
    let (mut files, serving) = volume.follow();
    assert_eq!(files.poll(now(), any), Polled::Swapped);
    let first = served(&serving);
    volume.replace(&pair(-1, 30));
    assert_eq!(files.poll(now(), |_| false), Polled::Held);
    assert_eq!((served(&serving), serving.state().last_error), (first.clone(), None));
    assert_eq!(files.poll(now(), any), Polled::Swapped);
    assert_ne!(served(&serving), first);
}

#[test]
fn a_chain_is_trusted_by_a_bundle_with_its_authority_or_with_itself() {
    let ((authority, leaf), (other, _)) = (signed(), signed());
    let own = pair(-1, 30);
    let both = format!("{other}{authority}");
    for (pair, bundle, trusted) in [
        (&leaf, authority.as_str(), true),
        (&leaf, both.as_str(), true),
        (&leaf, other.as_str(), false),
        (&leaf, "", false),
        (&leaf, "rubbish", false),
        (&own, own.0.as_str(), true),
        (&own, authority.as_str(), false),
    ] {
        assert_eq!(is_trusted(chain(pair).chain(), bundle.as_bytes(), now()), trusted, "{bundle}");
    }
    assert!(!is_trusted(chain(&leaf).chain(), authority.as_bytes(), now() + DAY * 60), "it has ended");
    assert!(!is_trusted(chain(&own).chain(), own.0.as_bytes(), now() + DAY * 60), "it has ended");
    assert!(!is_trusted(&[], authority.as_bytes(), now()));
}

#[test]
fn a_bundle_gets_the_authority_and_keeps_another_one_for_an_hour() {
    let ((own, _), (other, _)) = (signed(), signed());
    let mut bundles = Bundles::default();
    let hour = Duration::from_secs(3600);
    let first = bundles.wanted(own.as_bytes(), None, now()).unwrap();
    assert_eq!(first, own.replace("\r\n", "\n"));
    assert_eq!(bundles.wanted(own.as_bytes(), Some(own.as_bytes()), now()), None, "it has it");
    let both = bundles.wanted(own.as_bytes(), Some(other.as_bytes()), now()).unwrap();
    assert_eq!(both.matches("BEGIN CERTIFICATE").count(), 2);
    assert_eq!(bundles.wanted(own.as_bytes(), Some(both.as_bytes()), now() + hour / 2), None);
    assert_eq!(bundles.wanted(own.as_bytes(), Some(both.as_bytes()), now() + hour), Some(first));
    let (ended, _) = pair(-30, -1);
    let with_ended = format!("{own}{ended}");
    assert!(bundles.wanted(own.as_bytes(), Some(with_ended.as_bytes()), now()).is_some(), "it has ended");
    assert_eq!(bundles.wanted(b"", Some(own.as_bytes()), now()), None, "nobody knows what to write");
}
