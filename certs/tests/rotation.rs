//! The shared authority: what replicas, configurations and clients see through rotations and accidents.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)] // helpers of tests are tests

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::Timestamp;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConnection, RootCertStore, ServerConnection};
use tgb_certs::{
    Authority, Lifetimes, SecretData, SelfSigned, Serving, Step, decide, server_config, service_names,
};

const HOUR: Duration = Duration::from_secs(3600);

fn lifetimes() -> Lifetimes {
    Lifetimes {
        authority: HOUR * 24 * 30,
        leaf: HOUR * 24,
        settle: Duration::from_secs(60),
        retention: HOUR * 8,
    }
}

fn start() -> Timestamp {
    "2026-01-01T00:00:00Z".parse().unwrap()
}

/// The API server's side: one Secret with a version, three configurations, and a clock.
struct World {
    now: Timestamp,
    secret: Option<(u64, SecretData)>,
    bundles: Vec<Option<Vec<u8>>>,
    publications: usize,
}

impl World {
    fn new() -> Self {
        Self { now: start(), secret: None, bundles: vec![None; 3], publications: 0 }
    }

    /// A write that fails if somebody wrote since `version`.
    fn write(&mut self, version: Option<u64>, data: SecretData) -> bool {
        if self.secret.as_ref().map(|s| s.0) != version {
            return false;
        }
        self.secret = Some((version.unwrap_or(0) + 1, data));
        true
    }

    /// What a replica does each time its timer fires, until there is nothing left to do.
    fn tick(&mut self, replica: &Replica) -> Step {
        for _ in 0..20 {
            let observed = self.bundles.clone();
            let secret = self.secret.clone();
            let step = replica.signed.step(secret.as_ref().map(|s| &s.1), &observed, self.now).unwrap();
            if let Some(write) = &step.write {
                assert!(step.publish.is_none());
                self.write(secret.map(|s| s.0), write.data.clone());
            } else if let Some(bundle) = &step.publish {
                self.publish(bundle);
            } else {
                return step;
            }
        }
        panic!("a replica never comes to rest");
    }

    fn publish(&mut self, bundle: &str) {
        for slot in &mut self.bundles {
            if slot.as_deref() != Some(bundle.as_bytes()) {
                *slot = Some(bundle.as_bytes().to_vec());
                self.publications += 1;
            }
        }
    }

    fn authorities(&self) -> usize {
        CertificateDer::pem_slice_iter(self.bundles[0].as_deref().unwrap_or_default()).count()
    }
}

struct Replica {
    signed: SelfSigned,
    serving: Arc<Serving>,
}

impl Replica {
    fn new() -> Self {
        let serving = Arc::new(Serving::default());
        let names = service_names("tgb-webhook", "tgb-system");
        Self { signed: SelfSigned::new(names, lifetimes(), Arc::clone(&serving)).unwrap(), serving }
    }
}

/// A fixed clock for the client's verification.
#[derive(Debug)]
struct At(Timestamp);

impl rustls::time_provider::TimeProvider for At {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_secs(self.0.as_second().try_into().unwrap())))
    }
}

/// A whole handshake in memory; the client trusts `bundle` and nothing else.
fn handshake(
    serving: &Arc<Serving>,
    bundle: &[u8],
    now: Timestamp,
    versions: &[&'static rustls::SupportedProtocolVersion],
) -> Result<(rustls::ProtocolVersion, Vec<u8>), rustls::Error> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(bundle) {
        roots.add(certificate.unwrap()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ClientConfig::builder_with_details(provider, Arc::new(At(now)))
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let name = ServerName::try_from("tgb-webhook.tgb-system.svc").unwrap();
    let mut client = ClientConnection::new(Arc::new(config), name)?;
    let mut server = ServerConnection::new(Arc::new(server_config(Arc::clone(serving)).unwrap()))?;
    for _ in 0..10 {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).unwrap();
        }
        let mut wire = wire.as_slice();
        while !wire.is_empty() {
            server.read_tls(&mut wire).unwrap();
            server.process_new_packets()?;
        }
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).unwrap();
        }
        let mut wire = wire.as_slice();
        while !wire.is_empty() {
            client.read_tls(&mut wire).unwrap();
            client.process_new_packets()?;
        }
        if !client.is_handshaking() && !server.is_handshaking() {
            let version = client.protocol_version().unwrap();
            return Ok((version, client.alpn_protocol().unwrap_or_default().to_vec()));
        }
    }
    panic!("the handshake never ends");
}

fn trusted(world: &World, replica: &Replica) {
    for bundle in &world.bundles {
        let bundle = bundle.as_deref().unwrap_or_default();
        handshake(&replica.serving, bundle, world.now, rustls::DEFAULT_VERSIONS)
            .unwrap_or_else(|e| panic!("at {}: {e}", world.now));
    }
}

#[test]
fn tls_1_2_and_1_3_are_spoken_with_alpn_h2() {
    let mut world = World::new();
    let replica = Replica::new();
    world.tick(&replica);
    let bundle = world.bundles[0].clone().unwrap();
    for (version, expected) in [
        (&rustls::version::TLS12, rustls::ProtocolVersion::TLSv1_2),
        (&rustls::version::TLS13, rustls::ProtocolVersion::TLSv1_3),
    ] {
        let (spoken, alpn) = handshake(&replica.serving, &bundle, world.now, &[version]).unwrap();
        assert_eq!(spoken, expected);
        assert_eq!(alpn, b"h2");
    }
}

#[test]
fn the_first_start_makes_one_authority_and_is_ready_once_it_is_published() {
    let mut world = World::new();
    let replica = Replica::new();
    let first = replica.signed.step(None, &world.bundles, world.now).unwrap();
    assert!(first.write.is_some() && !first.ready);
    assert!(world.tick(&replica).ready);
    trusted(&world, &replica);
    assert_eq!((world.authorities(), world.publications), (1, 3));
}

#[test]
fn two_replicas_that_race_to_make_the_authority_agree_on_one() {
    let mut world = World::new();
    let (a, b) = (Replica::new(), Replica::new());
    let of_a = a.signed.step(None, &world.bundles, world.now).unwrap().write.unwrap();
    let of_b = b.signed.step(None, &world.bundles, world.now).unwrap().write.unwrap();
    assert_ne!(of_a.data, of_b.data);
    assert!(world.write(None, of_a.data));
    assert!(!world.write(None, of_b.data));
    world.tick(&b);
    world.tick(&a);
    trusted(&world, &a);
    trusted(&world, &b);
    assert_eq!(world.publications, 3);
}

#[test]
fn in_a_year_of_rotations_no_leaf_is_ever_served_that_is_not_published() {
    let mut world = World::new();
    let replicas = [Replica::new(), Replica::new(), Replica::new()];
    let (mut most, mut authorities) = (0, std::collections::BTreeSet::new());
    // Replicas look at different times, one of them seldom, but within the retention.
    for turn in 0..(365 * 12) {
        world.now = start() + HOUR * 2 * turn;
        for (every, replica) in (1..).zip(&replicas) {
            if turn % every == 0 {
                world.tick(replica);
                authorities.insert(world.secret.as_ref().unwrap().1.get("ca.crt").unwrap().clone());
            }
            most = most.max(world.authorities());
            if turn > 3 && turn % 12 == 0 {
                trusted(&world, replica);
            }
        }
        // The expensive handshake seldom, the cheap look always: the issuer of each served leaf is in each bundle.
        for replica in &replicas {
            let Some(pair) = replica.serving.pair() else { continue };
            assert!(pair.check_dates(world.now).is_ok(), "an expired leaf at {}", world.now);
            let leaf = x509_parser::parse_x509_certificate(&pair.chain()[0]).unwrap().1;
            for bundle in world.bundles.iter().flatten() {
                let known = CertificateDer::pem_slice_iter(bundle).any(|c| {
                    let c = c.unwrap();
                    x509_parser::parse_x509_certificate(&c).unwrap().1.subject() == leaf.issuer()
                });
                assert!(known, "an unpublished leaf at {}", world.now);
            }
        }
    }
    assert_eq!(most, 2);
    assert!(authorities.len() >= 18, "only {} authorities in a year", authorities.len());
    // Per rotation: the next one comes, the previous one goes. A promotion publishes nothing.
    assert!(world.publications <= 3 * 2 * authorities.len());
}

#[test]
fn a_leaf_of_the_next_authority_waits_until_it_is_published_everywhere_and_has_settled() {
    let mut world = World::new();
    let replica = Replica::new();
    world.tick(&replica);
    let before = replica.serving.pair().unwrap().chain()[0].clone();
    world.now = start() + HOUR * 24 * 21; // a third is left
    // One configuration refuses to be written: everything else may go on, the leaf may not.
    let stuck = world.bundles[2].clone();
    for _ in 0..100 {
        let step =
            replica.signed.step(world.secret.as_ref().map(|s| &s.1), &world.bundles, world.now).unwrap();
        if let Some(write) = step.write {
            world.write(world.secret.as_ref().map(|s| s.0), write.data);
        } else if let Some(bundle) = step.publish {
            world.publish(&bundle);
            world.bundles[2].clone_from(&stuck);
        }
        world.now += Duration::from_secs(10);
    }
    let issuer =
        |pair: &CertificateDer<'_>| x509_parser::parse_x509_certificate(pair).unwrap().1.issuer().to_string();
    assert_eq!(issuer(&before), issuer(&replica.serving.pair().unwrap().chain()[0]));
    trusted(&world, &replica);

    world.tick(&replica);
    assert_eq!(issuer(&before), issuer(&replica.serving.pair().unwrap().chain()[0]), "before it has settled");
    world.now += Duration::from_secs(60);
    world.tick(&replica);
    assert_ne!(issuer(&before), issuer(&replica.serving.pair().unwrap().chain()[0]));
    trusted(&world, &replica);
}

#[test]
fn a_secret_that_is_deleted_or_overwritten_breaks_no_replica() {
    for garbage in [None, Some(SecretData::from([("ca.crt".to_owned(), b"garbage".to_vec())]))] {
        let mut world = World::new();
        let (a, b) = (Replica::new(), Replica::new());
        world.tick(&a);
        world.tick(&b);
        world.secret = garbage.map(|data| (9, data));
        world.tick(&a);
        trusted(&world, &a);
        trusted(&world, &b); // has not looked yet
        let newcomer = Replica::new();
        assert!(world.tick(&newcomer).ready);
        trusted(&world, &newcomer);
        world.now += Duration::from_secs(61);
        for replica in [&a, &b, &newcomer] {
            assert!(world.tick(replica).ready);
        }
        for replica in [&a, &b, &newcomer] {
            trusted(&world, replica);
        }
        world.now += HOUR * 9;
        world.tick(&a);
        assert_eq!(world.authorities(), 1);
        trusted(&world, &b);
    }
}

#[test]
fn an_upgrade_that_wipes_a_bundle_makes_it_unready_until_it_is_written_again() {
    let mut world = World::new();
    let replica = Replica::new();
    world.tick(&replica);
    world.bundles[1] = None;
    let step = replica.signed.step(world.secret.as_ref().map(|s| &s.1), &world.bundles, world.now).unwrap();
    assert!(!step.ready);
    assert!(step.publish.is_some());
    assert!(world.tick(&replica).ready);
}

#[test]
fn an_authority_of_somebody_else_is_published_beside_ours_for_the_time_of_retention() {
    let (mut world, replica, other) = (World::new(), Replica::new(), Replica::new());
    world.tick(&replica);
    let theirs = Authority::make(world.now, HOUR * 24 * 30).unwrap();
    // As cert-manager does it: the whole bundle of one configuration is another one.
    world.bundles[1] = Some(theirs.certificate_pem().into_bytes());
    for replica in [&replica, &other] {
        world.tick(replica);
        assert_eq!(world.authorities(), 2);
        let is_there = |bundle: &Option<Vec<u8>>| {
            CertificateDer::pem_slice_iter(bundle.as_deref().unwrap_or_default())
                .any(|there| there.unwrap() == *theirs.certificate())
        };
        assert!(world.bundles.iter().all(is_there));
        trusted(&world, replica);
    }
    let publications = world.publications;
    world.now += lifetimes().retention - HOUR;
    world.tick(&replica);
    assert_eq!((world.authorities(), world.publications), (2, publications));
    world.now += HOUR;
    for replica in [&replica, &other, &replica] {
        world.tick(replica);
        assert_eq!(world.authorities(), 1);
        trusted(&world, replica);
    }
}

#[test]
fn nothing_is_published_while_nothing_changes() {
    let mut world = World::new();
    let replica = Replica::new();
    world.tick(&replica);
    let written = world.secret.clone();
    for minute in 0..1000 {
        world.now = start() + Duration::from_secs(60 * minute);
        world.tick(&replica);
    }
    assert_eq!(world.publications, 3);
    assert_eq!(world.secret, written);
}

#[test]
fn an_expired_authority_is_replaced_at_once() {
    let mut world = World::new();
    let replica = Replica::new();
    world.tick(&replica);
    world.now = start() + HOUR * 24 * 31;
    assert!(world.tick(&replica).ready);
    trusted(&world, &replica);
}

#[test]
fn a_key_of_another_authority_in_the_secret_is_not_used() {
    let (one, two) = (Authority::make(start(), HOUR).unwrap(), Authority::make(start(), HOUR).unwrap());
    let mixed = SecretData::from([
        ("ca.crt".to_owned(), one.certificate_pem().into_bytes()),
        ("ca.key".to_owned(), two.key_pem().into_bytes()),
    ]);
    let decision = decide(Some(&mixed), &[None], None, start(), &lifetimes()).unwrap();
    let write = decision.write.unwrap();
    assert_eq!(write.reason, "the stored authority can't be used");
    assert_ne!(write.data["ca.crt"], mixed["ca.crt"]);
}

#[test]
fn lifetimes_that_leave_no_time_for_a_rotation_are_refused() {
    assert!(Lifetimes::default().check().is_ok());
    let short = Lifetimes { retention: HOUR * 24 * 365, ..Lifetimes::default() };
    assert!(short.check().is_err());
}

/// What a replica has read, between two of its requests.
enum Doing {
    Nothing,
    ReadConfigurations(Vec<(u64, Option<Vec<u8>>)>),
    Publishing { read: Vec<(u64, Option<Vec<u8>>)>, bundle: String, at: usize },
}

#[test]
fn replicas_whose_requests_interleave_at_random_never_serve_what_is_not_published() {
    let lifetimes = Lifetimes {
        authority: HOUR * 2,
        leaf: HOUR,
        settle: Duration::from_secs(60),
        retention: Duration::from_secs(1200),
    };
    let replica = || {
        let serving = Arc::new(Serving::default());
        let signed = SelfSigned::new(service_names("w", "n"), lifetimes, Arc::clone(&serving)).unwrap();
        (Replica { signed, serving }, Doing::Nothing)
    };
    let mut random = 42_u64;
    let mut below = |n: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % n
    };
    let (mut now, mut version) = (start(), 0_u64);
    let mut secret: Option<(u64, SecretData)> = None;
    let mut configurations: Vec<(u64, Option<Vec<u8>>)> = vec![(0, None); 3];
    let mut replicas = [replica(), replica(), replica()];
    let (mut conflicts, mut deleted, mut authorities) = (0, 0, std::collections::BTreeSet::new());
    for _ in 0..8000 {
        now += Duration::from_secs(below(40));
        let settled = configurations.iter().all(|c| c.1.is_some());
        match below(2000) {
            0 if settled => {
                secret = None;
                deleted += 1;
            }
            1 => replicas[usize::try_from(below(3)).unwrap()] = replica(),
            _ => {}
        }
        let (replica, doing) = &mut replicas[usize::try_from(below(3)).unwrap()];
        *doing = match std::mem::replace(doing, Doing::Nothing) {
            Doing::Nothing => Doing::ReadConfigurations(configurations.clone()),
            Doing::ReadConfigurations(read) => {
                let seen: Vec<_> = read.iter().map(|c| c.1.clone()).collect();
                let stored = secret.clone();
                let step = replica.signed.step(stored.as_ref().map(|s| &s.1), &seen, now).unwrap();
                // Reading the Secret and writing it are one turn here or two: another may come between.
                if let Some(write) = step.write {
                    if below(4) == 0 {
                        conflicts += 1; // somebody else was faster: the API server says 409
                    } else {
                        version += 1;
                        secret = Some((version, write.data));
                    }
                    Doing::Nothing
                } else if let Some(bundle) = step.publish {
                    Doing::Publishing { read, bundle, at: 0 }
                } else {
                    Doing::Nothing
                }
            }
            Doing::Publishing { read, bundle, at } => {
                if configurations[at].0 == read[at].0 {
                    version += 1;
                    configurations[at] = (version, Some(bundle.clone().into_bytes()));
                } else {
                    conflicts += 1;
                }
                if at < 2 { Doing::Publishing { read, bundle, at: at + 1 } } else { Doing::Nothing }
            }
        };
        authorities.extend(secret.as_ref().and_then(|s| s.1.get("ca.crt").cloned()));
        if !settled {
            continue;
        }
        for (replica, _) in &replicas {
            let Some(pair) = replica.serving.pair() else { continue };
            // A replica that has just started may serve what is not published yet; it is not ready then.
            let leaf = x509_parser::parse_x509_certificate(&pair.chain()[0]).unwrap().1;
            let known = configurations.iter().filter_map(|c| c.1.as_deref()).all(|bundle| {
                CertificateDer::pem_slice_iter(bundle).any(|c| {
                    let c = c.unwrap();
                    x509_parser::parse_x509_certificate(&c).unwrap().1.subject() == leaf.issuer()
                })
            });
            assert!(known || replica.serving.state().swaps == 1, "an unpublished leaf at {now}");
        }
    }
    assert!(
        authorities.len() > 10 && conflicts > 10 && deleted > 0,
        "{} {conflicts} {deleted}",
        authorities.len()
    );
}

/// What clients see of the world, which changes under them.
#[derive(Debug)]
struct Seen {
    now: std::sync::atomic::AtomicI64,
    bundle: Mutex<Vec<u8>>,
    /// Steps so far, and the connections under way that began at an even and at an odd one.
    turn: AtomicUsize,
    under_way: [AtomicUsize; 2],
}

impl rustls::time_provider::TimeProvider for Seen {
    fn current_time(&self) -> Option<UnixTime> {
        let seconds = self.now.load(Ordering::SeqCst).try_into().unwrap();
        Some(UnixTime::since_unix_epoch(Duration::from_secs(seconds)))
    }
}

impl Seen {
    /// One request on a connection of its own, with the bundle as it was when it began.
    fn request(self: &Arc<Self>, server: std::net::SocketAddr) -> Result<(), String> {
        let begun = loop {
            let turn = self.turn.load(Ordering::SeqCst);
            self.under_way[turn % 2].fetch_add(1, Ordering::SeqCst);
            if self.turn.load(Ordering::SeqCst) == turn {
                break turn;
            }
            self.under_way[turn % 2].fetch_sub(1, Ordering::SeqCst);
        };
        let answered = self.exchange(server).map_err(|error| format!("turn {begun}: {error}"));
        self.under_way[begun % 2].fetch_sub(1, Ordering::SeqCst);
        answered
    }

    fn exchange(self: &Arc<Self>, server: std::net::SocketAddr) -> std::io::Result<()> {
        let bundle = self.bundle.lock().unwrap().clone();
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(&bundle) {
            roots.add(certificate.unwrap()).unwrap();
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let time = Arc::clone(self);
        let config = rustls::ClientConfig::builder_with_details(provider, time)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from("tgb-webhook.tgb-system.svc").unwrap();
        let mut connection = ClientConnection::new(Arc::new(config), name).unwrap();
        let mut socket = TcpStream::connect(server)?;
        let mut stream = rustls::Stream::new(&mut connection, &mut socket);
        stream.write_all(b"?")?;
        stream.read_exact(&mut [0])
    }
}

/// Answers one byte for each, on every connection of its own thread.
fn answer(listener: &TcpListener, config: &Arc<rustls::ServerConfig>) {
    while let Ok((mut socket, _)) = listener.accept() {
        let mut connection = ServerConnection::new(Arc::clone(config)).unwrap();
        let mut stream = rustls::Stream::new(&mut connection, &mut socket);
        // A failure is the client's to tell.
        let _ = stream.read_exact(&mut [0]).and_then(|()| stream.write_all(b"!"));
    }
}

#[test]
fn a_thousand_rotations_under_load_fail_no_request() {
    let mut world = World::new();
    let lifetimes = Lifetimes {
        authority: HOUR * 24,
        leaf: HOUR * 12,
        settle: Duration::from_secs(60),
        retention: HOUR * 7,
    };
    let serving = Arc::new(Serving::default());
    let names = service_names("tgb-webhook", "tgb-system");
    let replica =
        Replica { signed: SelfSigned::new(names, lifetimes, Arc::clone(&serving)).unwrap(), serving };
    world.tick(&replica);
    let seen = Arc::new(Seen {
        now: world.now.as_second().into(),
        bundle: Mutex::new(world.bundles[0].clone().unwrap()),
        turn: AtomicUsize::new(0),
        under_way: Default::default(),
    });
    let listener = Arc::new(TcpListener::bind("127.0.0.1:0").unwrap());
    let server = listener.local_addr().unwrap();
    let config = Arc::new(server_config(Arc::clone(&replica.serving)).unwrap());
    for _ in 0..4 {
        let (listener, config) = (Arc::clone(&listener), Arc::clone(&config));
        std::thread::spawn(move || answer(&listener, &config));
    }
    let over = AtomicBool::new(false);
    let answered = AtomicUsize::new(0);
    let mut authorities = std::collections::BTreeSet::new();
    let failed: Vec<String> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    while !over.load(Ordering::SeqCst) {
                        seen.request(server)?;
                        answered.fetch_add(1, Ordering::SeqCst);
                    }
                    Ok::<(), String>(())
                })
            })
            .collect();
        while replica.serving.state().swaps < 1_000 && clients.iter().all(|client| !client.is_finished()) {
            // Clients may be a step behind, as API servers are behind a watch, but not two.
            let turn = seen.turn.load(Ordering::SeqCst);
            while seen.under_way[(turn + 1) % 2].load(Ordering::SeqCst) > 0 {
                std::thread::yield_now();
            }
            world.now += if turn.is_multiple_of(4) { Duration::from_secs(61) } else { HOUR * 3 };
            seen.now.store(world.now.as_second(), Ordering::SeqCst);
            world.tick(&replica);
            seen.bundle.lock().unwrap().clone_from(world.bundles[0].as_ref().unwrap());
            seen.turn.store(turn + 1, Ordering::SeqCst);
            authorities.insert(world.secret.as_ref().unwrap().1.get("ca.crt").unwrap().clone());
        }
        over.store(true, Ordering::SeqCst);
        clients.into_iter().filter_map(|client| client.join().unwrap().err()).collect()
    });
    assert_eq!(failed, Vec::<String>::new());
    let (swaps, answered) = (replica.serving.state().swaps, answered.into_inner());
    assert!(
        swaps >= 1_000 && authorities.len() >= 250,
        "{swaps} leaves of {} authorities",
        authorities.len()
    );
    assert!(answered > 1_000, "{answered} requests");
    println!("{answered} requests, {swaps} leaves of {} authorities, 0 failed", authorities.len());
}
