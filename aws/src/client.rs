//! The handle on AWS: who we are, and what every call goes through: the fence, the budget, the metrics, repetition.

use crate::bounded::Bounded;
use crate::error::{AwsError, Class};
use crate::joined::Queue;
use crate::limits::{Budget, CallClass, Limits};
use crate::metrics::Metrics;
use crate::role::{self, ASSUME_ROLE, RoleClient};
use aws_credential_types::provider::error::CredentialsError;
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use aws_smithy_runtime_api::client::result::SdkError;
use aws_smithy_types::error::metadata::ProvideErrorMetadata;
use std::error::Error;
use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tgb_api::target_group::TargetGroup;
use tgb_api::v1::Role;
use tokio::sync::{OnceCell, Semaphore, SemaphorePermit, watch};
use tokio::time::{Instant, timeout};
use tracing::Instrument as _;

/// Everything that has to be known to speak to AWS; what is absent is found as AWS's SDKs find it (environment,
/// profile, IRSA, Pod Identity, instance metadata).
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// The region.
    pub region: Option<String>,
    /// The cluster's VPC.
    pub vpc_id: Option<String>,
    /// Names the sessions of assumed roles.
    pub cluster_name: String,
    /// Our own budget of calls.
    pub limits: Limits,
    /// The longest that an attempt to write may take: less than what is left between the end of a leader's term and the
    /// beginning of another's. Nothing: as long as one to read.
    pub write_timeout: Option<Duration>,
    /// Where calls are counted.
    pub metrics: Metrics,
}

/// Who we are at AWS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Twelve digits.
    pub account: String,
    /// `aws`, `aws-cn`, …
    pub partition: String,
    /// `eu-west-1`, …
    pub region: String,
}

/// A handle on AWS; clones share connections, credentials and budget.
#[derive(Clone)]
pub struct Aws {
    pub(crate) inner: Arc<Inner>,
    urgent: bool,
    turn: Option<Arc<Turn>>,
}

/// The right to one call that changes targets; given back if it is not made.
struct Turn {
    budget: Arc<Budget>,
    is_used: AtomicBool,
}

impl Drop for Turn {
    fn drop(&mut self) {
        if !self.is_used.load(Ordering::Relaxed) {
            self.budget.give_back(CallClass::ElbTargets);
        }
    }
}

pub(crate) struct Inner {
    pub(crate) config: aws_config::SdkConfig,
    own: aws_sdk_elasticloadbalancingv2::Client,
    pub(crate) ec2: aws_sdk_ec2::Client,
    identity: OnceCell<Identity>,
    region: String,
    vpc_id: OnceCell<Option<String>>,
    pub(crate) cluster_name: String,
    /// Look-ups of target groups that join, with our own identity.
    joined: Arc<Queue<TargetGroup>>,
    /// Roles that were assumed. Users name them, so that there is room for some only.
    assumed: Bounded<RoleKey, Assumed>,
    limits: Limits,
    write_timeout: Option<Duration>,
    pub(crate) budget: Arc<Budget>,
    /// Budgets of the accounts of assumed roles, as bounded.
    budgets: Bounded<String, Arc<Budget>>,
    pub(crate) metrics: Metrics,
    fence: OnceLock<Fence>,
    /// For calls at the same time.
    places: Semaphore,
    elb_health: Health,
    ec2_health: Health,
    recovered: watch::Sender<u64>,
}

/// A role and an external id.
type RoleKey = (String, Option<String>);

/// A role's client, and its look-ups that join.
#[derive(Clone)]
struct Assumed {
    client: RoleClient,
    joined: Arc<Queue<TargetGroup>>,
}

/// Bytes that roles may take, with a client of about so many for each; and budgets of accounts.
const ROLES: usize = 16 << 20;
const CLIENT: usize = 32 << 10;
const ACCOUNTS: usize = 1 << 20;

/// Calls at the same time; each takes a connection, which is kept for a while. At 100 ms a call that is more than AWS allows.
const AT_ONCE: usize = 64;

/// Whether we may write now.
type Fence = Box<dyn Fn() -> bool + Send + Sync>;

/// How many calls of a service in a row had no proper answer.
#[derive(Debug, Default)]
struct Health(AtomicU32);

impl Health {
    /// So many failures in a row are an outage.
    const OUTAGE: u32 = 3;

    fn is_out(&self) -> bool {
        self.0.load(Ordering::Acquire) >= Self::OUTAGE
    }
}

/// An ELBv2 client and whose budget it draws on.
#[derive(Clone)]
pub(crate) struct Elb {
    pub(crate) client: aws_sdk_elasticloadbalancingv2::Client,
    budget: Arc<Budget>,
    /// Must not be seen in a message.
    secret: Option<String>,
}

impl std::fmt::Debug for Aws {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Aws").field("region", &self.inner.region).finish_non_exhaustive()
    }
}

pub(crate) type Answer<T> = Result<T, AwsError>;
pub(crate) type Sent<T, E> = Result<T, SdkError<E, HttpResponse>>;

/// A call that failed on the way, or was throttled, goes out this often in all. The SDK itself repeats nothing: each
/// attempt has to pass our own budget, and is counted.
const ATTEMPTS: u32 = 3;
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(8);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Credentials are renewed so long before their end.
const AHEAD: Duration = Duration::from_secs(120);
/// How often a service is asked while it does not answer.
const PROBE: Duration = Duration::from_secs(2);

impl Aws {
    /// Finds region and credentials. Makes no call to a service.
    ///
    /// # Errors
    /// `NoRegion`, with what to do about it.
    pub async fn connect(settings: Settings) -> Answer<Self> {
        Self::connect_by(aws_config::defaults(aws_config::BehaviorVersion::latest()), settings).await
    }

    async fn connect_by(loader: aws_config::ConfigLoader, settings: Settings) -> Answer<Self> {
        let cache = aws_config::identity::IdentityCache::lazy().buffer_time(AHEAD).build();
        let mut loader = loader
            .retry_config(aws_config::retry::RetryConfig::disabled())
            .identity_cache(cache)
            .timeout_config(
                aws_config::timeout::TimeoutConfig::builder()
                    .connect_timeout(CONNECT_TIMEOUT)
                    .operation_attempt_timeout(ATTEMPT_TIMEOUT)
                    .build(),
            );
        if let Some(region) = settings.region.clone().filter(|region| !region.is_empty()) {
            loader = loader.region(aws_config::Region::new(region));
        }
        let config = loader.load().await;
        let region = config.region().map(ToString::to_string).ok_or_else(|| AwsError {
            operation: "Connect",
            code: "NoRegion".to_owned(),
            message: "no AWS region is known; give --aws-region or set AWS_REGION".to_owned(),
        })?;
        Ok(Self::over(config, region, settings))
    }

    /// A handle on what this configuration leads to.
    pub(crate) fn over(config: aws_config::SdkConfig, region: String, settings: Settings) -> Self {
        let given = settings.vpc_id.filter(|id| !id.is_empty());
        let inner = Inner {
            own: aws_sdk_elasticloadbalancingv2::Client::new(&config),
            ec2: aws_sdk_ec2::Client::new(&config),
            config,
            identity: OnceCell::new(),
            region,
            vpc_id: given.map_or_else(OnceCell::new, |id| OnceCell::new_with(Some(Some(id)))),
            cluster_name: settings.cluster_name,
            joined: Arc::default(),
            assumed: Bounded::new(ROLES, |(role, external_id): &RoleKey, _| {
                CLIENT + role.len() + external_id.as_ref().map_or(0, String::len)
            }),
            limits: settings.limits,
            write_timeout: settings.write_timeout,
            budget: Arc::new(Budget::new(&settings.limits)),
            budgets: Bounded::new(ACCOUNTS, |account: &String, _| (1 << 10) + account.len()),
            metrics: settings.metrics,
            fence: OnceLock::new(),
            places: Semaphore::new(AT_ONCE),
            elb_health: Health::default(),
            ec2_health: Health::default(),
            recovered: watch::Sender::new(0),
        };
        Self { inner: Arc::new(inner), urgent: false, turn: None }
    }

    /// The same, whose reads go before those of others when the budget is short. Writes always do.
    #[must_use]
    pub fn urgent(&self) -> Self {
        Self { inner: Arc::clone(&self.inner), urgent: true, turn: None }
    }

    /// The same, whose next RegisterTargets or DeregisterTargets need not wait for the budget; nothing, if it would have to.
    pub fn try_turn(&self, role: Option<Role<'_>>) -> Option<Self> {
        let budget = self.budget_for(role);
        budget.try_take(CallClass::ElbTargets).then(|| self.with_turn(budget))
    }

    /// As [`Self::try_turn`], once there is room for it. Whoever looks only then what to send, sends what came meanwhile, too.
    ///
    /// # Errors
    /// If this replica may not write.
    pub async fn turn(&self, role: Option<Role<'_>>) -> Answer<Self> {
        let budget = self.budget_for(role);
        self.wait(CallClass::ElbTargets, "Wait", budget.take(CallClass::ElbTargets, true)).await?;
        Ok(self.with_turn(budget))
    }

    fn with_turn(&self, budget: Arc<Budget>) -> Self {
        let turn = Arc::new(Turn { budget, is_used: AtomicBool::new(false) });
        Self { inner: Arc::clone(&self.inner), urgent: self.urgent, turn: Some(turn) }
    }

    /// From now on nothing is written unless `may_write` says so at that moment; set once.
    pub fn fence(&self, may_write: impl Fn() -> bool + Send + Sync + 'static) {
        // The first one stays.
        let _ = self.inner.fence.set(Box::new(may_write));
    }

    /// How our calls fare.
    pub fn metrics(&self) -> &Metrics {
        &self.inner.metrics
    }

    /// The region that calls go to.
    pub fn region(&self) -> &str {
        &self.inner.region
    }

    /// The cluster's VPC, if it was given or found.
    pub fn vpc_id(&self) -> Option<&str> {
        self.inner.vpc_id.get()?.as_deref()
    }

    /// The cluster's VPC: as given, or that of the instance that we run on by its metadata service.
    pub async fn find_vpc_id(&self) -> Option<&str> {
        self.inner.vpc_id.get_or_init(vpc_of_this_instance).await.as_deref()
    }

    /// Who we are (GetCallerIdentity, once; it needs no permission).
    ///
    /// # Errors
    /// What STS answered; `NoCredentials` where there are none.
    pub async fn identity(&self) -> Answer<&Identity> {
        self.inner
            .identity
            .get_or_try_init(|| async {
                let sts = aws_sdk_sts::Client::new(&self.inner.config);
                let answer = self
                    .ec2(CallClass::Sts, "GetCallerIdentity", || sts.get_caller_identity().send())
                    .await?;
                let arn = answer.arn().unwrap_or_default();
                Ok(Identity {
                    account: answer.account().unwrap_or_default().to_owned(),
                    partition: arn.split(':').nth(1).unwrap_or("aws").to_owned(),
                    region: self.inner.region.clone(),
                })
            })
            .await
    }

    /// Tells when a service that was out answers again.
    pub fn recoveries(&self) -> Recoveries {
        Recoveries { aws: self.clone(), seen: self.inner.recovered.subscribe() }
    }

    /// A call of EC2 or STS, with our own identity.
    pub(crate) async fn ec2<T, E, F>(
        &self,
        class: CallClass,
        operation: &'static str,
        send: impl FnMut() -> F,
    ) -> Answer<T>
    where
        F: Future<Output = Sent<T, E>>,
        E: ProvideErrorMetadata + Error + 'static,
    {
        self.call(&self.inner.budget, class, operation, send).await
    }

    /// A call of ELBv2.
    pub(crate) async fn elb<T, E, F>(
        &self,
        elb: &Elb,
        class: CallClass,
        operation: &'static str,
        send: impl FnMut() -> F,
    ) -> Answer<T>
    where
        F: Future<Output = Sent<T, E>>,
        E: ProvideErrorMetadata + Error + 'static,
    {
        let answer = self.call(&elb.budget, class, operation, send).await;
        answer.map_err(|error| error.without(elb.secret.as_deref()))
    }

    /// All pages of a description. `send` gets the token of the page, `take` its answer and gives the next token.
    pub(crate) async fn pages<T, E, F>(
        &self,
        operation: &'static str,
        mut send: impl FnMut(Option<String>) -> F,
        mut take: impl FnMut(T) -> Option<String>,
    ) -> Answer<()>
    where
        F: Future<Output = Sent<T, E>>,
        E: ProvideErrorMetadata + Error + 'static,
    {
        let mut token = None;
        loop {
            let page = self.ec2(CallClass::Ec2Describe, operation, || send(token.clone())).await?;
            token = take(page).filter(|token| !token.is_empty());
            if token.is_none() {
                return Ok(());
            }
        }
    }

    /// The ELBv2 client of our own identity or of an assumed role. Two callers that need a role at once make one
    /// client; its credentials are renewed ahead of their end.
    pub(crate) async fn client_for(&self, role: Option<Role<'_>>) -> Elb {
        let budget = self.budget_for(role);
        let Some(role) = role else { return Elb { client: self.inner.own.clone(), budget, secret: None } };
        let client = self.assumed(role).client;
        Elb { client, budget, secret: role.external_id.map(str::to_owned) }
    }

    fn assumed(&self, role: Role<'_>) -> Assumed {
        let key = (role.role_arn.to_owned(), role.external_id.map(str::to_owned));
        let make = || Assumed { client: role::client(&self.inner, role), joined: Arc::default() };
        self.inner.assumed.get_or_insert_with(key, make)
    }

    /// The look-ups with our own identity or with a role.
    pub(crate) fn joined(&self, role: Option<Role<'_>>) -> Arc<Queue<TargetGroup>> {
        role.map_or_else(|| Arc::clone(&self.inner.joined), |role| self.assumed(role).joined)
    }

    // ---- details ----

    fn budget_for(&self, role: Option<Role<'_>>) -> Arc<Budget> {
        role.map_or_else(|| Arc::clone(&self.inner.budget), |role| self.budget_of(role.role_arn))
    }

    /// AWS counts the calls of each account by itself.
    fn budget_of(&self, role_arn: &str) -> Arc<Budget> {
        let account = role_arn.split(':').nth(4).unwrap_or_default();
        if self.inner.identity.get().is_some_and(|own| own.account == account) {
            return Arc::clone(&self.inner.budget);
        }
        let made = || Arc::new(Budget::new(&self.inner.limits));
        self.inner.budgets.get_or_insert_with(account.to_owned(), made)
    }

    async fn call<T, E, F>(
        &self,
        budget: &Budget,
        class: CallClass,
        operation: &'static str,
        mut send: impl FnMut() -> F,
    ) -> Answer<T>
    where
        F: Future<Output = Sent<T, E>>,
        E: ProvideErrorMetadata + Error + 'static,
    {
        let mut attempt = 1;
        loop {
            let place = self.admit(budget, class, operation).await?;
            let begun = Instant::now();
            let span = tracing::info_span!(
                "aws",
                otel.name = operation,
                operation,
                attempt,
                code = tracing::field::Empty
            );
            // Boxed, so that a call that waits for its turn keeps no room for what follows.
            let answer = Box::pin(send().instrument(span.clone()));
            let longest = self.inner.write_timeout.filter(|_| class.writes()).unwrap_or(Duration::MAX);
            let answer = match timeout(longest, answer).await {
                Ok(answer) => answer.map_err(|error| failed(operation, &error)),
                Err(_) => Err(timed_out(operation)),
            };
            drop(place);
            let code = answer.as_ref().err().map(|error| error.code.as_str());
            span.record("code", code.unwrap_or("ok"));
            self.inner.metrics.called(class, operation, code, begun.elapsed());
            let error = match answer {
                // The role was not assumed, which was tried twice; the service itself was not asked.
                Err(error) if error.operation == ASSUME_ROLE => return Err(error),
                answer => {
                    self.note(class, answer.as_ref().err());
                    match answer {
                        Ok(answer) => return Ok(answer),
                        Err(error) => error,
                    }
                }
            };
            match error.class() {
                Class::Throttled => budget.throttled(class),
                Class::Retry if !self.health(class).is_some_and(Health::is_out) => {
                    let pause = Duration::from_millis(50).saturating_mul(2u32.saturating_pow(attempt));
                    tokio::time::sleep(pause.mul_f64(0.5 + fastrand::f64() * 0.5)).await;
                }
                Class::Retry | Class::Terminal => return Err(error),
            }
            if attempt == ATTEMPTS {
                return Err(error);
            }
            attempt += 1;
            self.inner.metrics.repeated(class, operation);
        }
    }

    /// Waits for the budget and for a place.
    async fn admit(
        &self,
        budget: &Budget,
        class: CallClass,
        operation: &'static str,
    ) -> Answer<Option<SemaphorePermit<'_>>> {
        let turn = self.turn.as_ref().filter(|_| class == CallClass::ElbTargets);
        let has_turn = turn.is_some_and(|turn| !turn.is_used.swap(true, Ordering::Relaxed));
        let taking = async {
            if !has_turn {
                budget.take(class, self.urgent).await;
            }
            self.inner.places.acquire().await.ok()
        };
        self.wait(class, operation, taking).await
    }

    /// Waits; at the end, and while waiting, the fence decides over what writes.
    async fn wait<T>(
        &self,
        class: CallClass,
        operation: &'static str,
        waiting: impl Future<Output = T>,
    ) -> Answer<T> {
        const LOOKS: Duration = Duration::from_millis(200);
        let begun = Instant::now();
        let fenced = || class.writes() && self.inner.fence.get().is_some_and(|may_write| !may_write());
        let stopped = || AwsError {
            operation,
            code: "NotLeading".to_owned(),
            message: "this replica may not write now".to_owned(),
        };
        let mut waiting = std::pin::pin!(waiting);
        let out = loop {
            tokio::select! {
                biased;
                out = &mut waiting => break out,
                () = tokio::time::sleep(LOOKS) => {
                    if fenced() {
                        return Err(stopped());
                    }
                }
            }
        };
        self.inner.metrics.waited(class, begun.elapsed());
        if fenced() { Err(stopped()) } else { Ok(out) }
    }

    fn health(&self, class: CallClass) -> Option<&Health> {
        match class {
            CallClass::ElbDescribe | CallClass::ElbTargets => Some(&self.inner.elb_health),
            CallClass::Ec2Describe | CallClass::Ec2Change => Some(&self.inner.ec2_health),
            CallClass::Sts => None,
        }
    }

    /// Notes whether the service answers.
    fn note(&self, class: CallClass, error: Option<&AwsError>) {
        let Some(health) = self.health(class) else { return };
        if error.is_some_and(AwsError::is_outage) {
            health.0.fetch_add(1, Ordering::AcqRel);
        } else if error.is_none_or(|error| error.class() != Class::Retry)
            && health.0.swap(0, Ordering::AcqRel) >= Health::OUTAGE
        {
            self.inner.recovered.send_modify(|times| *times += 1);
        }
    }
}

/// See [`Aws::recoveries`].
pub struct Recoveries {
    aws: Aws,
    seen: watch::Receiver<u64>,
}

impl std::fmt::Debug for Recoveries {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recoveries").finish_non_exhaustive()
    }
}

impl Recoveries {
    /// Waits for the next. While a service is out it is asked every two seconds, so that nobody else has to.
    pub async fn next(&mut self) {
        loop {
            tokio::select! {
                // The sender lives as long as our own handle.
                _ = self.seen.changed() => return,
                () = tokio::time::sleep(PROBE) => {
                    let inner = &self.aws.inner;
                    if inner.elb_health.is_out() {
                        self.aws.probe_elb().await;
                    }
                    if inner.ec2_health.is_out() {
                        self.aws.probe_ec2().await;
                    }
                }
            }
        }
    }
}

impl AwsError {
    /// The same without a text that nobody may see.
    fn without(mut self, secret: Option<&str>) -> Self {
        if let Some(secret) = secret.filter(|secret| self.message.contains(secret)) {
            self.message = self.message.replace(secret, "…");
        }
        self
    }
}

/// Asks the instance metadata service, unless AWS_EC2_METADATA_DISABLED says not to.
async fn vpc_of_this_instance() -> Option<String> {
    let disabled = std::env::var("AWS_EC2_METADATA_DISABLED").unwrap_or_default();
    if disabled.eq_ignore_ascii_case("true") {
        return None;
    }
    let client = aws_config::imds::Client::builder().max_attempts(2).build();
    let ask = async {
        let mac = client.get("/latest/meta-data/mac").await.ok()?;
        let path = format!("/latest/meta-data/network/interfaces/macs/{}/vpc-id", mac.as_ref().trim());
        let id = client.get(path).await.ok()?;
        Some(id.as_ref().trim().to_owned()).filter(|id| id.starts_with("vpc-"))
    };
    tokio::time::timeout(Duration::from_secs(5), ask).await.ok().flatten()
}

pub(crate) fn failed<E>(operation: &'static str, error: &SdkError<E, HttpResponse>) -> AwsError
where
    E: ProvideErrorMetadata + Error + 'static,
{
    let (code, message) = match error {
        SdkError::ServiceError(service) => (
            service
                .err()
                .code()
                .map_or_else(|| format!("Http{}", service.raw().status().as_u16()), str::to_owned),
            plain(service.err().message().unwrap_or("no message")),
        ),
        SdkError::TimeoutError(_) => return timed_out(operation),
        SdkError::ResponseError(response) => {
            (format!("Http{}", response.raw().status().as_u16()), "an answer that cannot be read".to_owned())
        }
        _ => return without_answer(operation, error),
    };
    // A server's failure without a code of its own may pass.
    let code = if code.starts_with("Http5") { "ServiceUnavailable".to_owned() } else { code };
    AwsError { operation, code, message }
}

fn timed_out(operation: &'static str) -> AwsError {
    AwsError { operation, code: "Timeout".to_owned(), message: "AWS did not answer in time".to_owned() }
}

/// The call did not get so far as to be answered.
fn without_answer(operation: &'static str, error: &(dyn Error + 'static)) -> AwsError {
    let text = chain(error);
    let mut cause = Some(error);
    while let Some(this) = cause {
        // Ours, from assuming a role.
        if let Some(own) = this.downcast_ref::<AwsError>() {
            return own.clone();
        }
        if let Some(credentials) = this.downcast_ref::<CredentialsError>() {
            let inner = this.source().and_then(|source| source.downcast_ref::<AwsError>());
            if let Some(own) = inner {
                return own.clone();
            }
            let code = match credentials {
                CredentialsError::CredentialsNotLoaded(_) | CredentialsError::InvalidConfiguration(_) => {
                    "NoCredentials"
                }
                _ if text.contains("AccessDenied") => "AccessDenied",
                _ => "CredentialsUnavailable",
            };
            return AwsError { operation, code: code.to_owned(), message: chain(this) };
        }
        cause = this.source();
    }
    AwsError { operation, code: "Unreachable".to_owned(), message: text }
}

/// AWS's sentence without what only a decoder can read.
fn plain(message: &str) -> String {
    let end = message.find("Encoded authorization failure message").unwrap_or(message.len());
    message.get(..end).unwrap_or(message).trim().to_owned()
}

/// An error with its causes in one line, outermost first, each said once.
fn chain(error: &(dyn Error + 'static)) -> String {
    let one_line = |error: &dyn Error| error.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
    let mut text = one_line(error);
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = one_line(cause);
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TargetGroupQuery;
    use aws_credential_types::Credentials;
    use aws_smithy_runtime_api::client::http::{
        HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpConnector,
    };
    use aws_smithy_runtime_api::client::orchestrator::HttpRequest;
    use aws_smithy_runtime_api::client::result::ConnectorError;
    use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
    use std::collections::BTreeSet;

    /// Notes where requests go, and sends none.
    #[derive(Debug, Clone, Default)]
    struct Recorder(Arc<std::sync::Mutex<BTreeSet<String>>>);

    impl HttpConnector for Recorder {
        fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
            self.0.lock().unwrap().insert(request.uri().to_owned());
            HttpConnectorFuture::ready(Err(ConnectorError::user("nobody is called".into())))
        }
    }

    impl HttpClient for Recorder {
        fn http_connector(&self, _: &HttpConnectorSettings, _: &RuntimeComponents) -> SharedHttpConnector {
            SharedHttpConnector::new(self.clone())
        }
    }

    #[tokio::test]
    async fn endpoints_are_those_of_the_region_its_partition_and_what_the_user_asks_for() {
        let (elb, ec2, sts) = ("elasticloadbalancing", "ec2", "sts");
        for (region, fips, dual_stack, hosts) in [
            ("eu-west-1", false, false, [elb, ec2, sts].map(|s| format!("{s}.eu-west-1.amazonaws.com"))),
            ("us-west-2", true, false, [elb, ec2, sts].map(|s| format!("{s}-fips.us-west-2.amazonaws.com"))),
            ("us-west-2", false, true, [elb, ec2, sts].map(|s| format!("{s}.us-west-2.api.aws"))),
            ("us-west-2", true, true, [elb, ec2, sts].map(|s| format!("{s}-fips.us-west-2.api.aws"))),
            ("cn-north-1", false, false, [elb, ec2, sts].map(|s| format!("{s}.cn-north-1.amazonaws.com.cn"))),
            (
                "us-gov-west-1",
                false,
                false,
                [elb, ec2, sts].map(|s| format!("{s}.us-gov-west-1.amazonaws.com")),
            ),
        ] {
            let recorder = Recorder::default();
            let loader = aws_config::defaults(aws_config::BehaviorVersion::latest())
                .http_client(recorder.clone())
                .credentials_provider(Credentials::for_tests())
                .use_fips(fips)
                .use_dual_stack(dual_stack);
            let settings = Settings { region: Some(region.to_owned()), ..Settings::default() };
            let aws = Aws::connect_by(loader, settings).await.unwrap();
            assert_eq!(aws.identity().await.unwrap_err().code, "Unreachable");
            assert!(aws.subnets("vpc-1").await.is_err());
            assert!(aws.target_groups(None, TargetGroupQuery::Name("web")).await.is_err());
            let asked = recorder.0.lock().unwrap().clone();
            let hosts: BTreeSet<String> = hosts.iter().map(|host| format!("https://{host}/")).collect();
            assert_eq!(asked, hosts, "{region}, FIPS {fips}, dual stack {dual_stack}");
        }
    }

    async fn unconnected(settings: Settings) -> Aws {
        let loader = aws_config::defaults(aws_config::BehaviorVersion::latest())
            .http_client(Recorder::default())
            .credentials_provider(Credentials::for_tests());
        let region = Some("eu-west-1".to_owned());
        Aws::connect_by(loader, Settings { region, ..settings }).await.unwrap()
    }

    type Described = Sent<(), aws_sdk_elasticloadbalancingv2::operation::describe_tags::DescribeTagsError>;

    #[tokio::test]
    async fn a_role_that_can_not_be_assumed_is_no_outage_of_the_service() {
        let aws = unconnected(Settings::default()).await;
        let elb = aws.client_for(None).await;
        let says = async |own: &'static str, code: &str| {
            let attempts = AtomicU32::new(0);
            let send = || {
                attempts.fetch_add(1, Ordering::Relaxed);
                let error = AwsError { operation: own, code: code.to_owned(), message: String::new() };
                std::future::ready(Described::Err(SdkError::construction_failure(error)))
            };
            let error = aws.elb(&elb, CallClass::ElbDescribe, "DescribeTags", send).await.unwrap_err();
            assert_eq!((error.operation, error.code.as_str()), (own, code));
            attempts.into_inner()
        };
        for code in ["Unreachable", "Timeout", "ServiceUnavailable", "Throttling", "AccessDenied"] {
            assert_eq!(says(ASSUME_ROLE, code).await, 1, "{code}");
        }
        assert!(!aws.inner.elb_health.is_out());
        assert_eq!(says("DescribeTags", "Unreachable").await, ATTEMPTS);
        assert!(aws.inner.elb_health.is_out());
        // And trouble with STS does not say that the service answers again.
        says(ASSUME_ROLE, "AccessDenied").await;
        assert!(aws.inner.elb_health.is_out());
    }

    #[tokio::test]
    async fn a_write_is_given_up_before_another_leader_may_write() {
        let write_timeout = Some(Duration::from_millis(20));
        let aws = unconnected(Settings { write_timeout, ..Settings::default() }).await;
        let elb = aws.client_for(None).await;
        let send = || async {
            tokio::time::sleep(Duration::from_millis(500)).await;
            Described::Ok(())
        };
        assert_eq!(aws.elb(&elb, CallClass::ElbDescribe, "DescribeTags", send).await, Ok(()));
        let written = aws.elb(&elb, CallClass::ElbTargets, "RegisterTargets", send).await;
        assert_eq!(written.unwrap_err().code, "Timeout");
    }

    #[tokio::test]
    async fn clients_and_budgets_are_as_many_as_are_of_use_whatever_users_name() {
        let aws = unconnected(Settings::default()).await;
        let role = |n: usize| format!("arn:aws:iam::{n:012}:role/tgb");
        for n in 0..3000 {
            let (role_arn, id) = (role(n), "x".repeat(n));
            let role = Role { role_arn: &role_arn, external_id: Some(&id) };
            assert_eq!(aws.client_for(Some(role)).await.secret, Some(id.clone()));
        }
        assert!(aws.inner.assumed.bytes() <= ROLES && aws.inner.budgets.bytes() <= ACCOUNTS);
        // Whoever comes again finds what there is.
        let first = Role { role_arn: &role(0), external_id: None };
        assert!(Arc::ptr_eq(&aws.joined(Some(first)), &aws.joined(Some(first))));
        assert!(Arc::ptr_eq(&aws.budget_for(Some(first)), &aws.budget_for(Some(first))));
    }

    #[test]
    fn what_only_a_decoder_can_read_is_cut_off() {
        let said =
            "You are not authorized to perform this operation. Encoded authorization failure message: 4Hq8";
        assert_eq!(plain(said), "You are not authorized to perform this operation.");
    }

    #[test]
    fn an_external_id_is_in_no_message() {
        let error = AwsError {
            operation: "AssumeRole",
            code: "ValidationError".to_owned(),
            message: "Value 'my-secret' at 'externalId' failed to satisfy constraint".to_owned(),
        };
        assert!(!error.without(Some("my-secret")).message.contains("my-secret"));
    }
}
