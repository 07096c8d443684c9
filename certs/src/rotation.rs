//! Mode `self`: one authority that all replicas share in a Secret, and its replacement in two phases.
//!
//! The API server must know an authority before it sees a leaf of it, and forget it only after the last leaf is gone:
//!
//! | phase | Secret | published | leaves of |
//! |---|---|---|---|
//! | rest | current | current | current |
//! | 1, current is due | current, next | current + next | current |
//! | 2, next is published everywhere for `settle` | next as current, previous | previous + current | current |
//! | rest, after `retention` | current | current | current |
//!
//! An authority of somebody else that a configuration has, as of replicas of another mode that are still there or come, is
//! kept for `retention` like a previous one.
//!
//! Each change of the Secret is one write with its resourceVersion, so replicas that race agree on one of them. A replica
//! reads the *configurations first and the Secret after them*, and publishes with the resourceVersion of the configuration
//! that it read: what it publishes is then never older than what is there.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use rustls::pki_types::CertificateDer;

use crate::authority::{pem, read_bundle, validity};
use crate::{Authority, Error, Leaf, Reason, Serving};

/// The `data` of the Secret (type `Opaque`).
pub type SecretData = BTreeMap<String, Vec<u8>>;

const CURRENT: (&str, &str) = ("ca.crt", "ca.key");
const NEXT: (&str, &str) = ("next.crt", "next.key");
const NEXT_PUBLISHED: &str = "next.published-at";
const PREVIOUS: &str = "previous.crt";
const PREVIOUS_UNTIL: &str = "previous.until";

/// How long things live.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lifetimes {
    /// An authority; the next one is made with a third of it left.
    pub authority: Duration,
    /// A leaf; replaced with a third of it left.
    pub leaf: Duration,
    /// From "every configuration has the next authority" to the first leaf of it: API servers hear of a change by a watch.
    pub settle: Duration,
    /// How long the previous authority stays published: longer than the slowest replica takes to read the Secret.
    pub retention: Duration,
}

impl Default for Lifetimes {
    /// A year, a week, one minute, a day.
    fn default() -> Self {
        let day = Duration::from_secs(86_400);
        Self { authority: day * 365, leaf: day * 7, settle: Duration::from_secs(60), retention: day }
    }
}

impl Lifetimes {
    /// Whether a rotation fits into the last third of an authority's life.
    ///
    /// # Errors
    /// [`Error::Lifetimes`].
    pub fn check(&self) -> Result<(), Error> {
        if self.leaf.is_zero() || self.settle + self.retention >= self.authority / 3 {
            return Err(Error::Lifetimes);
        }
        Ok(())
    }
}

/// The Secret as it should become.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    /// All of its `data`: create it, or replace it with the resourceVersion that was read. A conflict is no error:
    /// read again.
    pub data: SecretData,
    /// For the log.
    pub reason: &'static str,
}

/// What to do with what was read.
#[derive(Debug)]
pub struct Decision {
    /// Write the Secret; nothing else then. Read everything again afterwards, at once.
    pub write: Option<Write>,
    /// The bundle (PEM) that configurations with another one should get.
    pub publish: Option<String>,
    /// Leaves come from this authority; `None`: go on with what is served.
    pub serve: Option<Authority>,
}

/// Decides from the Secret's `stored` data, the `observed` caBundles of all configurations (decoded, `None` where absent),
/// and the issuer of the leaf that is `served`. Makes keys where one is needed, otherwise depends on nothing else.
///
/// # Errors
/// When no authority can be made.
pub fn decide(
    stored: Option<&SecretData>,
    observed: &[Option<Vec<u8>>],
    served: Option<&CertificateDer<'_>>,
    now: Timestamp,
    lifetimes: &Lifetimes,
) -> Result<Decision, Error> {
    let observed: Vec<Vec<CertificateDer<'static>>> =
        observed.iter().map(|bundle| bundle.as_deref().map(read_bundle).unwrap_or_default()).collect();
    let everywhere = |wanted: &CertificateDer<'_>| {
        !observed.is_empty() && observed.iter().all(|b| b.iter().any(|c| c == wanted))
    };
    let secret = Contents::read(stored, now);
    if let Some((contents, reason)) = next_contents(&secret, &observed, everywhere, now, lifetimes)? {
        return Ok(Decision { write: Some(Write { data: contents, reason }), publish: None, serve: None });
    }

    let mut bundle: Vec<CertificateDer<'static>> = match secret.previous_is_over(now) {
        true => Vec::new(),
        false => secret.previous.clone(),
    };
    for authority in [secret.current.as_ref().ok(), secret.next.as_ref()].into_iter().flatten() {
        bundle.push(authority.certificate().clone());
    }
    sort(&mut bundle);
    let differs = observed.iter().any(|b| {
        let mut b = b.clone();
        sort(&mut b);
        b != bundle
    });
    let publish = differs.then(|| bundle.iter().map(pem).collect());

    let serve = match (secret.current, served) {
        // Nothing is served: whatever is the most trusted one.
        (Ok(current), None) => Some(current),
        (Err(_), None) => secret.next,
        // A promoted authority has been published for `settle`; after an accident it may be gone again.
        (Ok(current), Some(issuer))
            if current.certificate() == issuer || everywhere(current.certificate()) =>
        {
            Some(current)
        }
        (_, Some(_)) => None,
    };
    Ok(Decision { write: None, publish, serve })
}

/// The Secret, read.
struct Contents {
    current: Result<Authority, Reason>,
    next: Option<Authority>,
    next_unusable: bool,
    next_published: Option<Timestamp>,
    previous: Vec<CertificateDer<'static>>,
    previous_until: Option<Timestamp>,
    previous_stored: bool,
}

impl Contents {
    fn read(stored: Option<&SecretData>, now: Timestamp) -> Self {
        let get = |key: &str| stored.and_then(|s| s.get(key)).filter(|v| !v.is_empty());
        let time =
            |key: &str| get(key).and_then(|v| std::str::from_utf8(v).ok()).and_then(|t| t.parse().ok());
        let authority = |(crt, key): (&str, &str)| match (get(crt), get(key)) {
            (None, None) => Err(Reason::Missing),
            (crt, key) => Authority::parse(
                crt.map(Vec::as_slice).unwrap_or_default(),
                key.map(Vec::as_slice).unwrap_or_default(),
            )
            .map_err(Reason::Unusable)
            .and_then(|a| if now < a.not_after() { Ok(a) } else { Err(Reason::Expired) }),
        };
        let next = authority(NEXT);
        let previous = get(PREVIOUS).map(|v| read_bundle(v)).unwrap_or_default();
        Self {
            current: authority(CURRENT),
            next_unusable: !matches!(next, Ok(_) | Err(Reason::Missing)),
            next: next.ok(),
            next_published: time(NEXT_PUBLISHED),
            previous: alive(previous, now),
            previous_until: time(PREVIOUS_UNTIL),
            previous_stored: get(PREVIOUS).is_some(),
        }
    }

    /// Leaves of the previous authority are gone: it is published no longer.
    fn previous_is_over(&self, now: Timestamp) -> bool {
        self.current.is_ok() && self.next.is_none() && self.previous_until.is_none_or(|end| now >= end)
    }

    /// Authorities that configurations have and the Secret does not know.
    fn foreign(
        &self,
        observed: &[Vec<CertificateDer<'static>>],
        now: Timestamp,
    ) -> Vec<CertificateDer<'static>> {
        let own: Vec<&CertificateDer<'static>> = [self.current.as_ref().ok(), self.next.as_ref()]
            .into_iter()
            .flatten()
            .map(Authority::certificate)
            .chain(&self.previous)
            .collect();
        let mut foreign: Vec<_> =
            observed.iter().flatten().filter(|certificate| !own.contains(certificate)).cloned().collect();
        sort(&mut foreign);
        alive(foreign, now)
    }
}

/// The one next change of the Secret, if any, and why.
fn next_contents(
    secret: &Contents,
    observed: &[Vec<CertificateDer<'static>>],
    everywhere: impl Fn(&CertificateDer<'_>) -> bool,
    now: Timestamp,
    lifetimes: &Lifetimes,
) -> Result<Option<(SecretData, &'static str)>, Error> {
    let until = now.checked_add(lifetimes.retention).unwrap_or(Timestamp::MAX);
    let kept = || (secret.previous.clone(), secret.previous_until.unwrap_or(until));
    let make = || Authority::make(now, lifetimes.authority);
    let settled = |since: Timestamp| since.checked_add(lifetimes.settle).is_ok_and(|end| now >= end);

    let foreign = secret.foreign(observed, now);
    if let (Ok(current), false) = (&secret.current, foreign.is_empty()) {
        let mut previous = [secret.previous.clone(), foreign].concat();
        sort(&mut previous);
        let contents = data(Some(current), secret.next.as_ref(), secret.next_published, (previous, until));
        return Ok(Some((contents, "a configuration has another authority, too")));
    }

    Ok(match (&secret.current, &secret.next) {
        // Lost, but other replicas may still serve leaves of an authority that is published: keep it, take two phases.
        (Err(reason), None) => {
            let mut known: Vec<_> = observed.iter().flatten().cloned().collect();
            known.extend(secret.previous.iter().cloned());
            let mut known = alive(known, now);
            sort(&mut known);
            let why = match reason {
                Reason::Missing => "there is no authority yet",
                Reason::Expired => "the authority expired",
                Reason::Unusable(_) | Reason::Due => "the stored authority can't be used",
            };
            let made = make()?;
            if known.is_empty() {
                Some((data(Some(&made), None, None, (vec![], until)), why))
            } else {
                Some((data(None, Some(&made), None, (known, until)), why))
            }
        }
        (current, Some(next)) => {
            let current = current.as_ref().ok();
            match secret.next_published {
                _ if !everywhere(next.certificate()) => secret.next_published.map(|_| {
                    (data(current, Some(next), None, kept()), "a configuration lost the next authority")
                }),
                None => Some((
                    data(current, Some(next), Some(now), kept()),
                    "the next authority is published everywhere",
                )),
                Some(since) if settled(since) => {
                    let mut previous = secret.previous.clone();
                    previous.extend(current.map(|c| c.certificate().clone()));
                    sort(&mut previous);
                    Some((data(Some(next), None, None, (previous, until)), "the next authority takes over"))
                }
                Some(_) => None,
            }
        }
        (Ok(current), None) => {
            // One that is still published would look like somebody else's.
            let is_published = observed.iter().flatten().any(|there| secret.previous.contains(there));
            let over = secret.previous.is_empty() || (secret.previous_is_over(now) && !is_published);
            let none = (vec![], until);
            if secret.next_unusable {
                Some((data(Some(current), None, None, kept()), "the stored next authority can't be used"))
            } else if secret.previous_stored && over {
                Some((data(Some(current), None, None, none), "the previous authority is no longer needed"))
            } else if secret.previous.is_empty() && current.needs_renewal(now, lifetimes.authority).is_some()
            {
                Some((data(Some(current), Some(&make()?), None, none), "the authority is due for renewal"))
            } else {
                None
            }
        }
    })
}

fn data(
    current: Option<&Authority>,
    next: Option<&Authority>,
    next_published: Option<Timestamp>,
    (previous, until): (Vec<CertificateDer<'static>>, Timestamp),
) -> SecretData {
    let mut out = SecretData::new();
    for ((crt, key), authority) in [(CURRENT, current), (NEXT, next)] {
        if let Some(authority) = authority {
            out.insert(crt.to_owned(), authority.certificate_pem().into_bytes());
            out.insert(key.to_owned(), authority.key_pem().into_bytes());
        }
    }
    if let Some(at) = next_published {
        out.insert(NEXT_PUBLISHED.to_owned(), at.to_string().into_bytes());
    }
    if !previous.is_empty() {
        out.insert(PREVIOUS.to_owned(), previous.iter().map(pem).collect::<String>().into_bytes());
        out.insert(PREVIOUS_UNTIL.to_owned(), until.to_string().into_bytes());
    }
    out
}

/// Those that have not ended.
fn alive(certificates: Vec<CertificateDer<'static>>, now: Timestamp) -> Vec<CertificateDer<'static>> {
    certificates.into_iter().filter(|c| validity(c).is_ok_and(|(_, end)| now < end)).collect()
}

/// One order for all, so that a promotion (the same certificates in other roles) changes no configuration.
fn sort(certificates: &mut Vec<CertificateDer<'static>>) {
    certificates.sort_by(|a, b| a.as_ref().cmp(b.as_ref()));
    certificates.dedup();
}

/// What [`SelfSigned::step`] leaves to the caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Write the Secret, then take the next step at once.
    pub write: Option<Write>,
    /// Write this `caBundle` (PEM, before base64) into each configuration that has another one, with the resourceVersion
    /// that was read, then take the next step at once.
    pub publish: Option<String>,
    /// The issuer of the served leaf is in every configuration: a condition of `/readyz`.
    pub ready: bool,
}

/// One replica's part in mode `self`: decides and issues its leaf.
///
/// The caller's loop, every 10 s and at once after a write: read all configurations (both webhook configurations and the
/// CRD), *then* the Secret; call [`step`](Self::step); do what it says.
#[derive(Debug)]
pub struct SelfSigned {
    names: Vec<String>,
    lifetimes: Lifetimes,
    serving: Arc<Serving>,
    leaf: Mutex<Option<Leaf>>,
}

impl SelfSigned {
    /// For these DNS names and IP addresses, see [`service_names`](crate::service_names).
    ///
    /// # Errors
    /// [`Error::Lifetimes`].
    pub fn new(names: Vec<String>, lifetimes: Lifetimes, serving: Arc<Serving>) -> Result<Self, Error> {
        lifetimes.check()?;
        Ok(Self { names, lifetimes, serving, leaf: Mutex::new(None) })
    }

    /// Decides with [`decide`], and serves a new leaf where one is due.
    ///
    /// # Errors
    /// When a certificate can't be made; what is served stays.
    pub fn step(
        &self,
        stored: Option<&SecretData>,
        observed: &[Option<Vec<u8>>],
        now: Timestamp,
    ) -> Result<Step, Error> {
        let mut leaf = self.leaf.lock().unwrap_or_else(PoisonError::into_inner);
        let result = self.locked_step(&mut leaf, stored, observed, now);
        if let Err(error) = &result {
            self.serving.failed(error);
        }
        result
    }

    fn locked_step(
        &self,
        leaf: &mut Option<Leaf>,
        stored: Option<&SecretData>,
        observed: &[Option<Vec<u8>>],
        now: Timestamp,
    ) -> Result<Step, Error> {
        let served = leaf.as_ref().map(|l| &l.issuer);
        let Decision { write, publish, serve } = decide(stored, observed, served, now, &self.lifetimes)?;
        if let Some(authority) = serve {
            let due = leaf.as_ref().is_none_or(|l| l.issuer != *authority.certificate() || now >= l.renew_at);
            if due {
                let made = Leaf::issue(&authority, &self.names, now, self.lifetimes.leaf)?;
                tracing::info!(not_after = %made.pair.not_after, "serving a new certificate of our authority");
                self.serving.swap(made.pair.clone());
                *leaf = Some(made);
            }
        }
        let issuer = leaf.as_ref().map(|l| &l.issuer);
        let ready = issuer.is_some_and(|issuer| {
            !observed.is_empty()
                && observed
                    .iter()
                    .all(|b| b.as_deref().map(read_bundle).unwrap_or_default().iter().any(|c| c == issuer))
        });
        Ok(Step { write, publish, ready })
    }
}
