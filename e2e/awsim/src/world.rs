//! Many accounts side by side: who calls, faults, throttling, the journal and the clock around the pure [`Aws`].

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::state::{Aws, Quotas, Timing, partition};
use crate::wire::{AwsError, Params, Service, Xml, glob, timestamp};

/// The account of keys that name none.
pub const DEFAULT_ACCOUNT: &str = "123456789012";

/// How a server begins.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// Port on 127.0.0.1; 0 is any.
    pub port: u16,
    /// Timers of new accounts.
    pub timing: Timing,
    /// Quotas of new accounts.
    pub quotas: Quotas,
    /// Whether requests are throttled as AWS does.
    pub throttle: bool,
    /// Simulated seconds per real second.
    pub scale: f64,
    /// For faults with a probability.
    pub seed: u64,
    /// Calls that the journal keeps; older ones go.
    pub journal_limit: usize,
    /// Whether every role exists and trusts everybody. Off, a role has to be added.
    pub any_role: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            port: 0,
            timing: Timing::default(),
            quotas: Quotas::default(),
            throttle: false,
            scale: 1.0,
            seed: 1,
            journal_limit: 100_000,
            any_role: false,
        }
    }
}

impl Options {
    /// Targets become healthy and drain in fractions of a second.
    #[must_use]
    pub fn fast() -> Self {
        Self { timing: Timing::fast(), ..Self::default() }
    }
}

/// What goes wrong.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Effect {
    /// The answer comes later, in real milliseconds. Several add up.
    Latency {
        /// Real milliseconds.
        ms: u64,
    },
    /// This error in place of the call.
    Error {
        /// HTTP status.
        status: u16,
        /// Code.
        code: String,
        /// Text.
        message: String,
    },
    /// The service's throttling error.
    Throttle,
    /// HTTP 503.
    Unavailable,
    /// `AccessDenied` or `UnauthorizedOperation`.
    Deny,
    /// The connection is reset, nothing is done.
    Reset,
    /// The call is done, the connection is closed without an answer.
    LostResponse,
}

/// A fault: which calls, how many of them, and what happens to them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fault {
    /// To take it away again.
    #[serde(default)]
    pub name: Option<String>,
    /// Only this account.
    #[serde(default)]
    pub account: Option<String>,
    /// Only this region.
    #[serde(default)]
    pub region: Option<String>,
    /// Only this service.
    #[serde(default)]
    pub service: Option<Service>,
    /// Only these actions; `*` matches anything.
    #[serde(default)]
    pub action: Option<String>,
    /// Only calls with this text in the decoded parameters, as an ARN.
    #[serde(default)]
    pub contains: Option<String>,
    /// That many matching calls pass first.
    #[serde(default)]
    pub skip: u64,
    /// That many calls are hit, then it is over.
    #[serde(default)]
    pub count: Option<u64>,
    /// Share of the matching calls that are hit, from a seeded generator of this fault.
    #[serde(default)]
    pub probability: Option<f64>,
    /// Seed of that generator; the server's if there is none.
    #[serde(default)]
    pub seed: Option<u64>,
    /// It begins so many simulated milliseconds after it was added.
    #[serde(default)]
    pub after_ms: u64,
    /// It lasts so many simulated milliseconds, then it is over.
    #[serde(default)]
    pub for_ms: Option<u64>,
    /// What happens.
    pub effect: Effect,
}

impl Fault {
    /// Every call, for ever.
    #[must_use]
    pub fn new(effect: Effect) -> Self {
        Self {
            name: None,
            account: None,
            region: None,
            service: None,
            action: None,
            contains: None,
            skip: 0,
            count: None,
            probability: None,
            seed: None,
            after_ms: 0,
            for_ms: None,
            effect,
        }
    }

    /// A schedule by chance, the same for the same seed: `count` faults of an account, each of some calls or of a whole
    /// service, that begin within `length` of simulated time and are all over when it ends.
    #[must_use]
    pub fn schedule(seed: u64, account: &str, count: usize, length: Duration) -> Vec<Self> {
        let mut random = fastrand::Rng::with_seed(seed);
        let length = u64::try_from(length.as_millis()).unwrap_or(u64::MAX).max(1);
        let error = |status, code: &str| Effect::Error {
            status,
            code: code.to_owned(),
            message: "We encountered an internal error. Please try again.".to_owned(),
        };
        (0..count)
            .map(|_| {
                let effect = match random.u8(0..8) {
                    0 => Effect::Latency { ms: random.u64(10..1_000) },
                    1 => error(500, "InternalFailure"),
                    2 => error(502, "BadGateway"),
                    3 => Effect::Throttle,
                    4 => Effect::Unavailable,
                    5 => Effect::Reset,
                    _ => Effect::LostResponse,
                };
                let service = random.choice([Service::Elb, Service::Ec2, Service::Sts]);
                let action =
                    random.choice(["*", "Describe*", "*Targets", "*SecurityGroup*", "Describe*Groups"]);
                let after_ms = random.u64(0..length);
                Self {
                    account: Some(account.to_owned()),
                    service: if random.bool() { service } else { None },
                    action: action.map(str::to_owned),
                    probability: Some(0.2 + 0.8 * random.f64()),
                    seed: Some(random.u64(..)),
                    after_ms,
                    for_ms: Some(random.u64(0..=length - after_ms)),
                    ..Self::new(effect)
                }
            })
            .collect()
    }

    /// Only this account.
    #[must_use]
    pub fn account(mut self, account: &str) -> Self {
        self.account = Some(account.to_owned());
        self
    }

    /// Only these actions; `*` matches anything.
    #[must_use]
    pub fn action(mut self, action: &str) -> Self {
        self.action = Some(action.to_owned());
        self
    }

    /// Only this service.
    #[must_use]
    pub fn service(mut self, service: Service) -> Self {
        self.service = Some(service);
        self
    }

    /// Only calls whose decoded parameters hold this text, as an ARN.
    #[must_use]
    pub fn contains(mut self, text: &str) -> Self {
        self.contains = Some(text.to_owned());
        self
    }

    /// So many matching calls pass first.
    #[must_use]
    pub fn skip(mut self, calls: u64) -> Self {
        self.skip = calls;
        self
    }

    /// So many calls are hit.
    #[must_use]
    pub fn times(mut self, calls: u64) -> Self {
        self.count = Some(calls);
        self
    }

    /// It begins after some simulated time and lasts for some, then it is over.
    #[must_use]
    pub fn between(mut self, after: Duration, lasting: Duration) -> Self {
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        (self.after_ms, self.for_ms) = (ms(after), Some(ms(lasting)));
        self
    }

    /// A share of the calls, 0 to 1.
    #[must_use]
    pub fn probability(mut self, share: f64) -> Self {
        self.probability = Some(share);
        self
    }
}

/// A line of the journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// Simulated time, milliseconds since the epoch.
    pub time_ms: u64,
    /// Real microseconds since the server began.
    pub real_us: u64,
    /// Twelve digits.
    pub account: String,
    /// As in `us-west-2`.
    pub region: String,
    /// The service.
    pub service: Service,
    /// As in `RegisterTargets`.
    pub action: String,
    /// The caller's ARN.
    pub caller: String,
    /// Parameters as sent, decoded.
    pub parameters: BTreeMap<String, String>,
    /// HTTP status; 0 for a reset connection.
    pub status: u16,
    /// The error's code; none is success. `Reset` and `LostResponse` are awsim's own.
    pub code: Option<String>,
}

struct Line {
    call: Call,
    body: Box<[u8]>,
}

impl Line {
    fn read(&self) -> Call {
        let mut call = self.call.clone();
        call.parameters = form_urlencoded::parse(&self.body)
            .filter(|(k, _)| k != "Action" && k != "Version")
            .map(|(k, v)| (k.into_owned(), v.into_owned()))
            .collect();
        call
    }
}

/// A role that can be assumed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Role {
    /// `arn:aws:iam::111122223333:role/name`
    pub arn: String,
    /// Accounts (twelve digits), principals' ARNs, or `*`.
    pub trusts: Vec<String>,
    /// The external id that the trust policy wants.
    #[serde(default)]
    pub external_id: Option<String>,
    /// Longest session, seconds; 3600 if 0.
    #[serde(default)]
    pub max_duration: u64,
}

#[derive(Debug, Clone)]
struct Session {
    account: String,
    arn: String,
    user_id: String,
    expires_ms: u64,
}

#[derive(Default)]
struct Iam {
    roles: HashMap<String, Role>,
    sessions: HashMap<String, Session>,
    issued: u64,
}

struct Caller {
    account: String,
    arn: String,
    user_id: String,
    role_session: bool,
}

/// A fault that was added.
struct Active {
    fault: Fault,
    /// Matching calls so far.
    seen: u64,
    /// When it was added, simulated milliseconds.
    since_ms: u64,
    random: fastrand::Rng,
}

/// What an account has of its own beside its resources.
#[derive(Debug, Clone, Copy, Default)]
struct Own {
    /// How far its clock is ahead of the server's.
    ahead_ms: u64,
    /// Whether it is throttled; none: as all.
    throttle: Option<bool>,
}

struct Clock {
    at_ms: u64,
    since: Instant,
    scale: f64,
}

/// A request as the HTTP edge hands it over.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request<'a> {
    /// The `Authorization` header.
    pub authorization: Option<&'a str>,
    /// The form.
    pub body: &'a [u8],
}

/// What the HTTP edge does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reply {
    /// HTTP status.
    pub status: u16,
    /// XML.
    pub body: String,
    /// For the header.
    pub request_id: String,
    /// Real time to wait before.
    pub delay: Duration,
    /// Whether there is an answer at all.
    pub wire: Wire,
    /// What went wrong, lost answers included.
    pub error: Option<AwsError>,
}

/// What happens to the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wire {
    /// The answer is sent.
    Answer,
    /// The connection is closed without an answer.
    Close,
    /// The connection is reset.
    Reset,
}

/// By account and region.
type Accounts = HashMap<(String, String), Arc<Mutex<Aws>>>;

/// All accounts.
pub(crate) struct World {
    pub(crate) options: Options,
    accounts: RwLock<Accounts>,
    iam: Mutex<Iam>,
    faults: Mutex<Vec<Active>>,
    seed: std::sync::atomic::AtomicU64,
    own: Mutex<HashMap<String, Own>>,
    journal: Mutex<VecDeque<Line>>,
    /// Held for reading while a call is answered, until it is in the journal.
    answering: RwLock<()>,
    record: Mutex<Option<std::fs::File>>,
    buckets: Mutex<HashMap<String, (u64, u64)>>,
    throttle: std::sync::atomic::AtomicBool,
    clock: Mutex<Clock>,
    began: Instant,
    requests: std::sync::atomic::AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    pub(crate) fn new(options: Options) -> Self {
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .ok()
            .and_then(|d| u64::try_from(d.as_millis()).ok())
            .unwrap_or(0);
        Self {
            accounts: RwLock::default(),
            iam: Mutex::default(),
            faults: Mutex::default(),
            seed: options.seed.into(),
            own: Mutex::default(),
            journal: Mutex::default(),
            answering: RwLock::default(),
            record: Mutex::default(),
            buckets: Mutex::default(),
            throttle: options.throttle.into(),
            clock: Mutex::new(Clock { at_ms: now, since: Instant::now(), scale: options.scale }),
            began: Instant::now(),
            requests: 0.into(),
            options,
        }
    }

    pub(crate) fn now(&self) -> u64 {
        let clock = lock(&self.clock);
        let elapsed = clock.since.elapsed().mul_f64(clock.scale.max(0.0));
        clock.at_ms + u64::try_from(elapsed.as_millis()).unwrap_or(0)
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// The time of an account, which may be ahead.
    pub(crate) fn now_of(&self, account: &str) -> u64 {
        self.now() + lock(&self.own).get(account).map_or(0, |own| own.ahead_ms)
    }

    /// Moves the clock of an account or of all.
    pub(crate) fn advance(&self, account: Option<&str>, by: Duration) {
        let by = u64::try_from(by.as_millis()).unwrap_or(0);
        match account {
            Some(account) => lock(&self.own).entry(account.to_owned()).or_default().ahead_ms += by,
            None => lock(&self.clock).at_ms += by,
        }
    }

    pub(crate) fn scale(&self, scale: f64) {
        let now = self.now();
        *lock(&self.clock) = Clock { at_ms: now, since: Instant::now(), scale };
    }

    /// Switches throttling of an account or of all others; buckets are full then.
    pub(crate) fn throttle(&self, account: Option<&str>, on: bool) {
        match account {
            Some(account) => lock(&self.own).entry(account.to_owned()).or_default().throttle = Some(on),
            None => self.throttle.store(on, std::sync::atomic::Ordering::Relaxed),
        }
        lock(&self.buckets).retain(|key, _| account.is_some_and(|account| !key.starts_with(account)));
    }

    pub(crate) fn account(&self, account: &str, region: &str) -> Arc<Mutex<Aws>> {
        let key = (account.to_owned(), region.to_owned());
        if let Some(aws) = self.accounts.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Arc::clone(aws);
        }
        let mut accounts = self.accounts.write().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(accounts.entry(key).or_insert_with(|| {
            Arc::new(Mutex::new(Aws::new(account, region, self.options.timing, self.options.quotas)))
        }))
    }

    pub(crate) fn with<R>(&self, account: &str, region: &str, f: impl FnOnce(&mut Aws, u64) -> R) -> R {
        let now = self.now_of(account);
        let aws = self.account(account, region);
        let mut aws = lock(&aws);
        f(&mut aws, now)
    }

    pub(crate) fn reset(&self, account: Option<&str>) {
        self.accounts
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|(a, _), _| account.is_some_and(|account| account != a));
        lock(&self.journal).retain(|l| account.is_some_and(|account| account != l.call.account));
        lock(&self.faults)
            .retain(|f| account.is_some_and(|account| f.fault.account.as_deref() != Some(account)));
        lock(&self.own).retain(|a, _| account.is_some_and(|account| account != a));
    }

    pub(crate) fn add_fault(&self, fault: Fault) {
        let since_ms = fault.account.as_deref().map_or_else(|| self.now(), |account| self.now_of(account));
        let seed = fault.seed.unwrap_or_else(|| self.seed.load(std::sync::atomic::Ordering::Relaxed));
        let random = fastrand::Rng::with_seed(seed);
        lock(&self.faults).push(Active { fault, seen: 0, since_ms, random });
    }

    pub(crate) fn clear_faults(&self, name: Option<&str>, account: Option<&str>) {
        lock(&self.faults).retain(|f| {
            name.is_some_and(|n| f.fault.name.as_deref() != Some(n))
                || account.is_some_and(|a| f.fault.account.as_deref() != Some(a))
        });
    }

    pub(crate) fn faults(&self) -> Vec<Fault> {
        lock(&self.faults).iter().map(|f| f.fault.clone()).collect()
    }

    pub(crate) fn seed_random(&self, seed: u64) {
        self.seed.store(seed, std::sync::atomic::Ordering::Relaxed);
        for fault in &mut *lock(&self.faults) {
            fault.random = fastrand::Rng::with_seed(fault.fault.seed.unwrap_or(seed));
        }
    }

    pub(crate) fn add_role(&self, role: Role) {
        lock(&self.iam).roles.insert(role.arn.clone(), role);
    }

    /// The journal, in which every call is whose effect anybody can have seen.
    fn whole_journal(&self) -> MutexGuard<'_, VecDeque<Line>> {
        drop(self.answering.write().unwrap_or_else(PoisonError::into_inner));
        lock(&self.journal)
    }

    pub(crate) fn journal(&self, account: Option<&str>) -> Vec<Call> {
        self.whole_journal()
            .iter()
            .filter(|l| account.is_none_or(|a| a == l.call.account))
            .map(Line::read)
            .collect()
    }

    pub(crate) fn journal_after(&self, seen: usize) -> Vec<Call> {
        self.whole_journal().iter().skip(seen).map(Line::read).collect()
    }

    pub(crate) fn record_to(&self, file: std::fs::File) {
        *lock(&self.record) = Some(file);
    }

    /// Appends a request and its answer to the recording, if there is one.
    fn record(&self, service: Service, action: &str, request: &[u8], status: u16, answer: &str) {
        let mut record = lock(&self.record);
        let Some(file) = record.as_mut() else { return };
        let line = serde_json::json!({
            "service": service, "action": action, "request": String::from_utf8_lossy(request), "status": status,
            "answer": answer,
        });
        if let Err(error) = std::io::Write::write_all(file, format!("{line}\n").as_bytes()) {
            tracing::error!(%error, "the recording ends");
            *record = None;
        }
    }

    pub(crate) fn clear_journal(&self, account: Option<&str>) {
        self.whole_journal().retain(|l| account.is_some_and(|a| a != l.call.account));
    }

    /// Answers one request and writes it down.
    pub(crate) fn answer(&self, request: Request<'_>) -> Reply {
        let _answering = self.answering.read().unwrap_or_else(PoisonError::into_inner);
        let number = self.requests.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let params = Params::parse(request.body);
        let action = params.get("Action").unwrap_or_default();
        let scope = request.authorization.and_then(scope);
        let (service, region) = match scope {
            Some((_, region, service)) => (Service::by_name(service), region),
            None => (None, "us-east-1"),
        };
        let by_version = || match params.get("Version") {
            Some("2016-11-15") => Service::Ec2,
            Some("2011-06-15") => Service::Sts,
            _ => Service::Elb,
        };
        let known = service.is_some();
        let service = service.unwrap_or_else(by_version);
        let caller = self.caller(scope.map(|(key, ..)| key), service, region);
        let (caller_arn, account) = match &caller {
            Ok(caller) => (caller.arn.clone(), caller.account.clone()),
            Err(_) => (String::new(), DEFAULT_ACCOUNT.to_owned()),
        };
        let now = self.now_of(&account);
        let request_id = format!("{:08x}-0000-4000-8000-{number:012x}", now & 0xffff_ffff);
        let (delay, effect) = self.strike(&account, region, service, action, request.body, now);
        let mut wire = Wire::Answer;
        let mut result = match (caller, effect) {
            (Err(error), _) => Err(error),
            (Ok(_), Some(Effect::Reset)) => {
                wire = Wire::Reset;
                Err(AwsError::with_status(0, "Reset", ""))
            }
            (Ok(caller), Some(Effect::Deny)) => Err(denied(&caller.arn, service, action)),
            (Ok(_), Some(Effect::Throttle)) => Err(throttled(service)),
            (Ok(_), Some(Effect::Unavailable)) => Err(unavailable(service)),
            (Ok(_), Some(Effect::Error { status, code, message })) => {
                Err(AwsError::with_status(status, code, message))
            }
            (Ok(caller), effect) => {
                if effect == Some(Effect::LostResponse) {
                    wire = Wire::Close;
                }
                self.call(&caller, service, known, region, action, &params, now)
            }
        };
        if let Err(error) = &mut result
            && service == Service::Ec2
            && error.code == "ValidationError"
        {
            error.code = "InvalidParameterValue".into();
        }
        let (status, code, body) = match &result {
            Ok(xml) => (200, None, service.answer(action, &request_id, xml)),
            Err(error) => (error.status, Some(error.code.to_string()), error.body(service, &request_id)),
        };
        let (code, error) = match (wire, result) {
            (Wire::Close, _) => {
                let lost = AwsError::with_status(status, "LostResponse", "no answer came");
                (Some("LostResponse".to_owned()), Some(lost))
            }
            (_, result) => (code, result.err()),
        };
        if known && wire != Wire::Reset {
            self.record(service, action, request.body, status, &body);
        }
        let mut journal = lock(&self.journal);
        journal.push_back(Line {
            call: Call {
                time_ms: now,
                real_us: u64::try_from(self.began.elapsed().as_micros()).unwrap_or(0),
                account,
                region: region.to_owned(),
                service,
                action: action.to_owned(),
                caller: caller_arn,
                parameters: BTreeMap::new(),
                status,
                code,
            },
            body: request.body.into(),
        });
        while journal.len() > self.options.journal_limit {
            journal.pop_front();
        }
        Reply { status, body, request_id, delay, wire, error }
    }

    #[allow(clippy::too_many_arguments, reason = "the parts of one request")]
    fn call(
        &self,
        caller: &Caller,
        service: Service,
        known: bool,
        region: &str,
        action: &str,
        params: &Params,
        now: u64,
    ) -> Result<Xml, AwsError> {
        let own = lock(&self.own).get(&caller.account).and_then(|own| own.throttle);
        if own.unwrap_or_else(|| self.throttle.load(std::sync::atomic::Ordering::Relaxed)) {
            self.draw(&caller.account, region, service, action, params, now)?;
        }
        if action.is_empty() {
            return Err(AwsError::new("MissingAction", "The request is missing an action"));
        }
        if !known || params.get("Version") != Some(service.version()) {
            return Err(AwsError::new(
                "InvalidAction",
                format!("The action {action} is not valid for this web service"),
            ));
        }
        let aws = self.account(&caller.account, region);
        match service {
            Service::Elb => lock(&aws).elb(action, params, now),
            Service::Ec2 => lock(&aws).ec2(action, params, now),
            Service::Sts => self.sts(caller, region, action, params, now),
        }
    }

    fn caller(&self, key: Option<&str>, service: Service, region: &str) -> Result<Caller, AwsError> {
        let Some(key) = key else {
            return Err(AwsError::with_status(
                403,
                "MissingAuthenticationToken",
                "Request is missing Authentication Token",
            ));
        };
        let expired = |at: u64, now: u64| {
            let code = if service == Service::Ec2 { "RequestExpired" } else { "ExpiredToken" };
            (at <= now).then(|| {
                AwsError::with_status(403, code, "The security token included in the request is expired")
            })
        };
        if let Some(session) = lock(&self.iam).sessions.get(key) {
            if let Some(error) = expired(session.expires_ms, self.now_of(&session.account)) {
                return Err(error);
            }
            return Ok(Caller {
                account: session.account.clone(),
                arn: session.arn.clone(),
                user_id: session.user_id.clone(),
                role_session: true,
            });
        }
        let digits = |text: &str| text.len() == 12 && text.bytes().all(|b| b.is_ascii_digit());
        let named = [(key.get(..12), key.get(12..)), (key.get(4..16), key.get(16..))];
        let named = named.into_iter().find_map(|(account, user)| {
            account.filter(|text| digits(text)).zip(Some(user.filter(|text| !text.is_empty())))
        });
        if named.is_none() && key.starts_with("ASIA") {
            let (status, code, text) = match service {
                Service::Ec2 => {
                    (401, "AuthFailure", "AWS was not able to validate the provided access credentials")
                }
                _ => (403, "InvalidClientTokenId", "The security token included in the request is invalid."),
            };
            return Err(AwsError::with_status(status, code, text));
        }
        let (account, user) = named.unwrap_or((DEFAULT_ACCOUNT, None));
        let (account, user) = (account.to_owned(), user.unwrap_or("awsim"));
        let arn = format!("arn:{}:iam::{account}:user/{user}", partition(region));
        Ok(Caller { account, arn, user_id: "AIDAAWSIM00000000000".to_owned(), role_session: false })
    }

    /// The faults that hit a call: how long it takes, and what becomes of it.
    fn strike(
        &self,
        account: &str,
        region: &str,
        service: Service,
        action: &str,
        body: &[u8],
        now: u64,
    ) -> (Duration, Option<Effect>) {
        let mut faults = lock(&self.faults);
        let (mut delay, mut effect) = (Duration::ZERO, None);
        let mut text: Option<String> = None;
        // a fault of all accounts goes by the server's clock
        let all = self.now();
        for Active { fault, seen, since_ms, random } in faults.iter_mut() {
            let now = if fault.account.is_some() { now } else { all };
            let begins = since_ms.saturating_add(fault.after_ms);
            let fits = fault.account.as_deref().is_none_or(|a| a == account)
                && fault.region.as_deref().is_none_or(|r| r == region)
                && fault.service.is_none_or(|s| s == service)
                && fault.action.as_deref().is_none_or(|a| glob(a, action))
                && fault.count != Some(0)
                && now >= begins
                && fault.for_ms.is_none_or(|lasts| now < begins.saturating_add(lasts))
                && fault.contains.as_deref().is_none_or(|wanted| {
                    text.get_or_insert_with(|| {
                        form_urlencoded::parse(body).map(|(k, v)| format!("{k}={v}\n")).collect()
                    })
                    .contains(wanted)
                });
            let latency = matches!(fault.effect, Effect::Latency { .. });
            if !fits || (effect.is_some() && !latency) {
                continue;
            }
            if fault.probability.is_some_and(|share| random.f64() >= share) {
                continue;
            }
            *seen += 1;
            if *seen <= fault.skip {
                continue;
            }
            if let Some(count) = &mut fault.count {
                *count -= 1;
            }
            match &fault.effect {
                Effect::Latency { ms } => delay += Duration::from_millis(*ms),
                other => effect = Some(other.clone()),
            }
        }
        faults.retain(|Active { fault, since_ms, .. }| {
            let now = match fault.account.as_deref() {
                None => all,
                Some(of) if of == account => now,
                Some(_) => return true,
            };
            let ends =
                fault.for_ms.map(|lasts| since_ms.saturating_add(fault.after_ms).saturating_add(lasts));
            fault.count != Some(0) && ends.is_none_or(|ends| now < ends)
        });
        (delay, effect)
    }

    /// Takes from the token buckets that AWS publishes, from all or from none.
    fn draw(
        &self,
        account: &str,
        region: &str,
        service: Service,
        action: &str,
        params: &Params,
        now: u64,
    ) -> Result<(), AwsError> {
        const TOKEN: u64 = 1_000_000;
        let describe = action.starts_with("Describe");
        // name, burst, tokens per 10 seconds
        let wanted: Vec<(&str, u64, u64)> = match service {
            Service::Sts => return Ok(()),
            Service::Elb => {
                let class = match action {
                    "RegisterTargets" | "DeregisterTargets" => ("targets", 20, 40),
                    "CreateLoadBalancer" => ("balancers", 10, 2),
                    _ if describe => ("describe", 40, 100),
                    _ => ("mutate", 20, 30),
                };
                vec![("all", 40, 100), class]
            }
            Service::Ec2 => {
                let narrow = [
                    "Filter",
                    "MaxResults",
                    "InstanceId",
                    "NetworkInterfaceId",
                    "GroupId",
                    "VpcId",
                    "SubnetId",
                    "SecurityGroupRuleId",
                ]
                .iter()
                .any(|name| params.child(name).is_some());
                vec![match action {
                    "RunInstances" => (action, 5, 20),
                    "CreateTags" => (action, 100, 100),
                    _ if describe && narrow => (action, 100, 200),
                    _ if describe => (action, 50, 100),
                    _ => (action, 50, 50),
                }]
            }
        };
        let mut buckets = lock(&self.buckets);
        let mut drawn = Vec::new();
        for (name, burst, per_ten_seconds) in wanted {
            let key = format!("{account}/{region}/{}/{name}", service.name());
            let (tokens, at) = buckets.get(&key).copied().unwrap_or((burst * TOKEN, now));
            let refill = now.saturating_sub(at).saturating_mul(per_ten_seconds).saturating_mul(100);
            let tokens = tokens.saturating_add(refill).min(burst * TOKEN);
            let Some(left) = tokens.checked_sub(TOKEN) else {
                return Err(throttled(service));
            };
            drawn.push((key, (left, now)));
        }
        buckets.extend(drawn);
        Ok(())
    }

    fn sts(
        &self,
        caller: &Caller,
        region: &str,
        action: &str,
        p: &Params,
        now: u64,
    ) -> Result<Xml, AwsError> {
        let mut x = Xml::default();
        match action {
            "GetCallerIdentity" => {
                x.text("Arn", &caller.arn);
                x.text("UserId", &caller.user_id);
                x.text("Account", &caller.account);
                Ok(x)
            }
            "AssumeRole" => self.assume_role(caller, region, p, now),
            _ => Err(crate::elb::unknown_action(action)),
        }
    }

    fn assume_role(&self, caller: &Caller, region: &str, p: &Params, now: u64) -> Result<Xml, AwsError> {
        let role_arn = p.raw("RoleArn").unwrap_or_default();
        let session = p.raw("RoleSessionName").unwrap_or_default();
        constraint(
            "roleArn",
            role_arn,
            20,
            2048,
            "[\\u0009\\u000A\\u000D\\u0020-\\u007E\\u0085\\u00A0-\\uD7FF\\uE000-\\uFFFD\\u10000-\\u10FFFF]+",
            |_| true,
        )?;
        let word = |c: char, more: &str| c.is_ascii_alphanumeric() || c == '_' || more.contains(c);
        constraint("roleSessionName", session, 2, 64, "[\\w+=,.@-]*", |c| word(c, "+=,.@-"))?;
        let external = p.raw("ExternalId");
        if let Some(id) = external {
            constraint("externalId", id, 2, 1224, "[\\w+=,.@:\\/-]*", |c| word(c, "+=,.@:/-"))?;
        }
        let seconds = p.number("DurationSeconds")?.unwrap_or(3600);
        if !(900..=43_200).contains(&seconds) {
            let bound =
                if seconds < 900 { "greater than or equal to 900" } else { "less than or equal to 43200" };
            return Err(AwsError::validation(format!(
                "1 validation error detected: Value '{seconds}' at 'durationSeconds' failed to satisfy constraint: Member must have value {bound}"
            )));
        }
        let seconds = seconds.unsigned_abs();
        let denied = || {
            AwsError::with_status(
                403,
                "AccessDenied",
                format!(
                    "User: {} is not authorized to perform: sts:AssumeRole on resource: {role_arn}",
                    caller.arn
                ),
            )
        };
        let mut parts = role_arn.splitn(6, ':');
        let ("arn", Some(in_partition), "iam", Some(account), Some(name)) = (
            parts.next().unwrap_or_default(),
            parts.next(),
            parts.next().unwrap_or_default(),
            parts.nth(1),
            parts.next().and_then(|r| r.strip_prefix("role/")),
        ) else {
            return Err(AwsError::validation(format!("{role_arn} is invalid")));
        };
        if in_partition != partition(region) {
            return Err(denied());
        }
        let mut iam = lock(&self.iam);
        let max = match iam.roles.get(role_arn) {
            Some(role) => {
                let trusted = role.trusts.iter().any(|t| {
                    t == "*"
                        || *t == caller.arn
                        || *t == caller.account
                        || t.strip_suffix(":root")
                            .is_some_and(|t| t.ends_with(&format!("::{}", caller.account)))
                });
                if !trusted || role.external_id.as_deref().is_some_and(|id| external != Some(id)) {
                    return Err(denied());
                }
                if role.max_duration == 0 { 3600 } else { role.max_duration }
            }
            None if self.options.any_role => 43_200,
            None => return Err(denied()),
        };
        if seconds > max {
            return Err(AwsError::validation(
                "The requested DurationSeconds exceeds the MaxSessionDuration set for this role.",
            ));
        }
        if caller.role_session && seconds > 3600 {
            return Err(AwsError::validation(
                "The requested DurationSeconds exceeds the 1 hour session limit for roles assumed by role chaining",
            ));
        }
        iam.issued += 1;
        let key = format!("ASIAAWSIM{:011}", iam.issued);
        let role_name = name.rsplit('/').next().unwrap_or(name);
        let arn = format!("arn:{in_partition}:sts::{account}:assumed-role/{role_name}/{session}");
        let user_id = format!("AROAAWSIM{:012}:{session}", account.bytes().map(u64::from).sum::<u64>());
        let expires_ms = now + seconds * 1_000;
        let entry =
            Session { account: account.to_owned(), arn: arn.clone(), user_id: user_id.clone(), expires_ms };
        iam.sessions.insert(key.clone(), entry);
        let mut x = Xml::default();
        x.el("Credentials", |x| {
            x.text("AccessKeyId", &key);
            x.text("SecretAccessKey", "awsim0000000000000000000000000000000000");
            x.text("SessionToken", &format!("awsim-session-{key}"));
            x.text("Expiration", &timestamp(expires_ms));
        });
        x.el("AssumedRoleUser", |x| {
            x.text("AssumedRoleId", &user_id);
            x.text("Arn", &arn);
        });
        x.text("PackedPolicySize", "6");
        Ok(x)
    }
}

/// Access key, region and service of a signature.
fn scope(authorization: &str) -> Option<(&str, &str, &str)> {
    let credential = authorization.split_once("Credential=")?.1;
    let credential = credential.split([',', ' ']).next()?;
    let mut parts = credential.split('/');
    let key = parts.next()?;
    let _date = parts.next()?;
    Some((key, parts.next()?, parts.next()?))
}

fn throttled(service: Service) -> AwsError {
    match service {
        Service::Ec2 => AwsError::with_status(503, "RequestLimitExceeded", "Request limit exceeded."),
        Service::Elb | Service::Sts => AwsError::new("Throttling", "Rate exceeded"),
    }
}

fn unavailable(service: Service) -> AwsError {
    let code = if service == Service::Ec2 { "Unavailable" } else { "ServiceUnavailable" };
    AwsError::with_status(503, code, "Service is unable to handle request.")
}

fn denied(caller: &str, service: Service, action: &str) -> AwsError {
    let text = format!(
        "User: {caller} is not authorized to perform: {}:{action} on resource: * because no identity-based policy allows the {}:{action} action",
        service.name(),
        service.name()
    );
    match service {
        Service::Ec2 => AwsError::with_status(
            403,
            "UnauthorizedOperation",
            format!("You are not authorized to perform this operation. {text}"),
        ),
        Service::Elb | Service::Sts => AwsError::with_status(403, "AccessDenied", text),
    }
}

fn constraint(
    name: &str,
    value: &str,
    low: usize,
    high: usize,
    pattern: &str,
    fine: impl Fn(char) -> bool,
) -> Result<(), AwsError> {
    let length = value.chars().count();
    let problem = match () {
        () if length < low => format!("Member must have length greater than or equal to {low}"),
        () if length > high => format!("Member must have length less than or equal to {high}"),
        () if !value.chars().all(fine) => {
            format!("Member must satisfy regular expression pattern: {pattern}")
        }
        () => return Ok(()),
    };
    Err(AwsError::validation(format!(
        "1 validation error detected: Value '{value}' at '{name}' failed to satisfy constraint: {problem}"
    )))
}
