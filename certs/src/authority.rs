//! The authority of mode `self`, and the leaves that it signs.

use std::time::Duration;

use jiff::Timestamp;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::{Error, Pair};

/// Certificates begin this long before they are made, for clocks that differ.
const BACKDATE: Duration = Duration::from_secs(300);

/// Why an authority has to be replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// There is none.
    Missing,
    /// What is stored can't be used.
    Unusable(Error),
    /// Its time is over.
    Expired,
    /// Less than a third of its life is left.
    Due,
}

/// A certificate authority: a self-signed P-256 certificate and its key.
pub struct Authority {
    certificate: CertificateDer<'static>,
    key: KeyPair,
    not_before: Timestamp,
    not_after: Timestamp,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

impl Authority {
    /// Makes a new one that ends `lifetime` after `now`.
    ///
    /// # Errors
    /// When no key or certificate can be made.
    pub fn make(now: Timestamp, lifetime: Duration) -> Result<Self, Error> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|e| Error::Issue(e.to_string()))?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        // Two authorities in one bundle are told apart by their name already.
        let mark: String = params.key_identifier(&key).iter().take(8).map(|b| format!("{b:02x}")).collect();
        params.distinguished_name.remove(DnType::CommonName);
        params.distinguished_name.push(DnType::CommonName, format!("tgb-webhook-ca-{mark}"));
        set_validity(&mut params, now, lifetime, None)?;
        let certificate = params.self_signed(&key).map_err(|e| Error::Issue(e.to_string()))?.der().clone();
        let (not_before, not_after) = validity(&certificate)?;
        Ok(Self { certificate, key, not_before, not_after })
    }

    /// Reads what [`Authority::certificate_pem`] and [`Authority::key_pem`] wrote.
    ///
    /// # Errors
    /// When either can't be read, they don't belong together, or it is no authority.
    pub fn parse(certificate: &[u8], key: &[u8]) -> Result<Self, Error> {
        let certificate = CertificateDer::from_pem_slice(certificate).map_err(|e| Error::Malformed {
            what: "the authority".to_owned(),
            wanted: "certificate",
            cause: e.to_string(),
        })?;
        let malformed_key = |cause: String| Error::Malformed {
            what: "the authority".to_owned(),
            wanted: "private key",
            cause,
        };
        let text = std::str::from_utf8(key).map_err(|e| malformed_key(e.to_string()))?;
        let key = KeyPair::from_pem(text).map_err(|e| malformed_key(e.to_string()))?;
        let (_, parsed) = x509_parser::parse_x509_certificate(&certificate).map_err(unreadable)?;
        if !parsed.is_ca() {
            return Err(Error::NotAnAuthority);
        }
        if parsed.public_key().raw != key.subject_public_key_info() {
            return Err(Error::Mismatch);
        }
        let (not_before, not_after) = validity(&certificate)?;
        Ok(Self { certificate, key, not_before, not_after })
    }

    /// Whether it has to be replaced, if authorities live for `lifetime`: with a third of that left.
    pub fn needs_renewal(&self, now: Timestamp, lifetime: Duration) -> Option<Reason> {
        if now >= self.not_after {
            Some(Reason::Expired)
        } else if now >= before(self.not_after, lifetime / 3) {
            Some(Reason::Due)
        } else {
            None
        }
    }

    /// Its certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// Its certificate, as a `caBundle` and the Secret have it.
    pub fn certificate_pem(&self) -> String {
        pem(&self.certificate)
    }

    /// Its key, PKCS #8.
    pub fn key_pem(&self) -> String {
        self.key.serialize_pem()
    }

    /// When it ends.
    pub fn not_after(&self) -> Timestamp {
        self.not_after
    }
}

/// A server certificate that an [`Authority`] signed; its key is in memory only.
#[derive(Debug, Clone)]
pub struct Leaf {
    /// What is served.
    pub pair: Pair,
    /// The authority that signed it.
    pub issuer: CertificateDer<'static>,
    /// From then on it should be replaced: a third of its life is left.
    pub renew_at: Timestamp,
}

impl Leaf {
    /// Makes a key and a certificate for these DNS names and IP addresses. It ends `lifetime` after `now`, and never
    /// after its authority.
    ///
    /// # Errors
    /// When a name is none, or nothing can be made.
    pub fn issue(
        authority: &Authority,
        names: &[String],
        now: Timestamp,
        lifetime: Duration,
    ) -> Result<Self, Error> {
        let issue = |e: rcgen::Error| Error::Issue(e.to_string());
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(issue)?;
        let mut params = CertificateParams::new(names).map_err(issue)?;
        params.distinguished_name.remove(DnType::CommonName);
        params.distinguished_name.push(DnType::CommonName, "tgb-webhook");
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        set_validity(&mut params, now, lifetime, Some((authority.not_before, authority.not_after)))?;
        let issuer = Issuer::from_ca_cert_der(&authority.certificate, &authority.key).map_err(issue)?;
        let certificate = params.signed_by(&key, &issuer).map_err(issue)?.der().clone();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let pair = Pair::new(vec![certificate], key)?;
        let life = Duration::try_from(pair.not_after.duration_since(now)).unwrap_or_default();
        let renew_at = before(pair.not_after, life / 3);
        Ok(Self { pair, issuer: authority.certificate.clone(), renew_at })
    }
}

/// The names under which the API server reaches a Service: `NAME.NAMESPACE.svc` is the one that it verifies.
pub fn service_names(name: &str, namespace: &str) -> Vec<String> {
    vec![
        format!("{name}.{namespace}.svc"),
        format!("{name}.{namespace}.svc.cluster.local"),
        format!("{name}.{namespace}"),
    ]
}

/// `notBefore` and `notAfter` of a certificate.
pub(crate) fn validity(certificate: &CertificateDer<'_>) -> Result<(Timestamp, Timestamp), Error> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).map_err(unreadable)?;
    let dates = parsed.validity();
    let at = |seconds: i64| Timestamp::from_second(seconds).map_err(unreadable);
    Ok((at(dates.not_before.timestamp())?, at(dates.not_after.timestamp())?))
}

/// The certificates of a `caBundle`; what can't be read is left out.
pub(crate) fn read_bundle(bundle: &[u8]) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(bundle).filter_map(Result::ok).collect()
}

/// A certificate as PEM.
pub(crate) fn pem(certificate: &CertificateDer<'_>) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(certificate);
    let mut out = String::from("-----BEGIN CERTIFICATE-----\n");
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (line, tail) = rest.split_at_checked(64).unwrap_or((rest, ""));
        out.push_str(line);
        out.push('\n');
        rest = tail;
    }
    out.push_str("-----END CERTIFICATE-----\n");
    out
}

fn unreadable(cause: impl std::fmt::Display) -> Error {
    Error::Malformed { what: "the chain".to_owned(), wanted: "certificate", cause: cause.to_string() }
}

fn before(end: Timestamp, by: Duration) -> Timestamp {
    end.checked_sub(by).unwrap_or(Timestamp::UNIX_EPOCH)
}

/// Sets both dates, to the second, within `bounds`.
fn set_validity(
    params: &mut CertificateParams,
    now: Timestamp,
    lifetime: Duration,
    bounds: Option<(Timestamp, Timestamp)>,
) -> Result<(), Error> {
    let (mut from, mut to) =
        (before(now, BACKDATE), now.checked_add(lifetime).map_err(|e| Error::Issue(e.to_string()))?);
    if let Some((first, last)) = bounds {
        from = from.max(first);
        to = to.min(last);
    }
    // Both libraries end with the year 9999, so the sum can't overflow.
    let date = |t: Timestamp| {
        rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(u64::try_from(t.as_second()).unwrap_or(0))
    };
    params.not_before = date(from);
    params.not_after = date(to);
    Ok(())
}
