//! Keeps the served certificate current, and the authority behind it in every configuration that calls this server.

use crate::metrics::Metrics;
use crate::serve::{CertMode, Options};
use futures::StreamExt as _;
use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingWebhookConfiguration, WebhookClientConfig,
};
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, WebhookClientConfig as Converter,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ManagedFieldsEntry;
use kube::api::{Api, ObjectMeta, Patch, PatchParams, PostParams, WatchEvent, WatchParams};
use kube::{Client, Resource};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::convert::Infallible;
use std::fmt::Debug;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tgb_api::crd::Version;
use tgb_certs::{
    Bundles, FilePair, Lifetimes, Pair, Polled, SecretData, SelfSigned, Serving, is_trusted, service_names,
};
use tgb_process::cause;
use tokio::sync::Notify;
use tokio::time::Instant;

/// Between two looks at the cluster while all is well; a change that is seen is looked at sooner.
const EVERY: Duration = Duration::from_secs(10);
/// While nothing is served or published yet, and between two looks at mounted files.
const SOON: Duration = Duration::from_secs(1);
/// After a write.
const AT_ONCE: Duration = Duration::from_millis(50);
/// Between two attempts at most, of what fails or of what somebody else undoes.
const SELDOM: Duration = Duration::from_secs(30);
/// A configuration that is not there yet, as in the middle of an installation, is waited for so long; one that somebody has
/// deleted takes nobody out of the Service.
const INSTALLED: Duration = Duration::from_secs(15);
/// From "every configuration trusts the new certificate" to serving it: API servers hear of a change by a watch.
const SETTLE: Duration = Duration::from_secs(5);
/// This program as the manager of the fields that it writes.
const MANAGER: &str = "tgb-webhook";

/// The answers to `/readyz` and `/readyz?verbose`.
#[derive(Debug, Default)]
pub(crate) struct Health(Mutex<Told>);

#[derive(Debug, Default, Clone)]
struct Told {
    published: bool,
    problems: Vec<String>,
}

impl Health {
    /// Whether API servers trust what is served, and every sentence about what is wrong.
    pub(crate) fn get(&self) -> (bool, Vec<String>) {
        let told = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        (told.published, told.problems)
    }

    fn set(&self, published: bool, problems: Vec<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Told { published, problems };
    }

    /// An error of the newest look. What was published stays so: an API server that is away unpublishes nothing.
    fn failed(&self, problems: Vec<String>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).problems = problems;
    }
}

/// Checks that an authority can be kept with the flags.
///
/// # Errors
/// A sentence with the flags.
pub(crate) fn check(options: &Options) -> Result<(), String> {
    if options.cert_mode != CertMode::SelfSigned {
        return Ok(());
    }
    lifetimes(options).check().map_err(|error| {
        format!(
            "--ca-lifetime {:?}, --leaf-lifetime {:?}: {error}",
            options.ca_lifetime, options.leaf_lifetime
        )
    })
}

/// Keeps `serving` in step until the process ends.
///
/// # Errors
/// The same as [`check`].
pub(crate) async fn keep(
    options: Arc<Options>,
    client: Client,
    serving: Arc<Serving>,
    health: Arc<Health>,
    metrics: Arc<Metrics>,
) -> Result<Infallible, String> {
    let mut source = Source::new(&options, &serving)?;
    let every = match options.cert_mode {
        CertMode::SelfSigned => EVERY.min(options.leaf_lifetime / 10),
        CertMode::CertManager | CertMode::Files => EVERY,
    };
    let changed = changes(&options, &client);
    let cluster = Keeper { options, client, serving, health, metrics, begun: Instant::now() };
    let (mut told, mut failures, mut writes) = (String::new(), 0_u32, 0_u32);
    let mut look = Instant::now();
    loop {
        if let Source::Files(files) = &mut source
            && files.poll(&cluster.serving, Timestamp::now())
        {
            look = Instant::now();
        }
        if Instant::now() >= look {
            let done = cluster.look(&mut source).await;
            let wait = match done {
                Ok(progress) => {
                    told.clear();
                    failures = 0;
                    writes = if progress == Progress::Again { writes.saturating_add(1) } else { 0 };
                    match progress {
                        // Somebody who writes another one each time is not raced.
                        Progress::Again => doubled(AT_ONCE, writes),
                        Progress::Done => every,
                        Progress::Waiting => SOON,
                    }
                }
                Err(error) => {
                    // The same complaint once, not each time.
                    if told != error {
                        tracing::warn!(%error, "certificates can't be kept up to date");
                        told = error;
                    }
                    failures = failures.saturating_add(1);
                    doubled(SOON, failures)
                }
            };
            look = Instant::now() + wait;
        }
        let state = cluster.serving.state();
        if let Some(end) = state.not_after {
            cluster.metrics.certificate_not_after.set(end.as_second());
        }
        cluster.metrics.certificate_refused.set(i64::from(state.last_error.is_some()));
        let next = if matches!(source, Source::Files(_)) { look.min(Instant::now() + SOON) } else { look };
        tokio::select! {
            () = tokio::time::sleep_until(next) => {}
            () = changed.notified(), if failures == 0 && writes < 3 => look = Instant::now(),
        }
    }
}

/// `first`, and with each further time twice as long, up to [`SELDOM`].
fn doubled(first: Duration, times: u32) -> Duration {
    let factor = 2_u32.saturating_pow(times.saturating_sub(1).min(16));
    first.saturating_mul(factor).min(SELDOM)
}

/// Tells of every change of a configuration.
fn changes(options: &Options, client: &Client) -> Arc<Notify> {
    let changed = Arc::new(Notify::new());
    let name = options.webhook_config_name.as_str();
    tokio::spawn(follow::<MutatingWebhookConfiguration>(
        client.clone(),
        name.to_owned(),
        Arc::clone(&changed),
    ));
    tokio::spawn(follow::<ValidatingWebhookConfiguration>(
        client.clone(),
        name.to_owned(),
        Arc::clone(&changed),
    ));
    if let Some(crd) = options.crd() {
        tokio::spawn(follow::<CustomResourceDefinition>(
            client.clone(),
            crd.to_owned(),
            Arc::clone(&changed),
        ));
    }
    changed
}

/// Tells of every change of one object. Where it may not be watched, it is looked at now and then.
async fn follow<K>(client: Client, name: String, changed: Arc<Notify>)
where
    K: Resource<DynamicType = (), Scope = kube::core::ClusterResourceScope>
        + Clone
        + DeserializeOwned
        + Debug
        + 'static,
{
    let api: Api<K> = Api::all(client);
    let only = WatchParams::default().fields(&format!("metadata.name={name}")).timeout(240);
    let mut failures = 0;
    loop {
        if let Ok(events) = api.watch_metadata(&only, "0").await {
            let mut events = std::pin::pin!(events);
            while let Some(Ok(event)) = events.next().await {
                if !matches!(event, WatchEvent::Bookmark(_) | WatchEvent::Error(_)) {
                    failures = 0;
                    changed.notify_one();
                }
            }
        }
        failures = u32::saturating_add(failures, 1);
        tokio::time::sleep(doubled(SOON, failures)).await;
    }
}

/// The source of the pair.
enum Source {
    Authority(SelfSigned),
    Files(Files),
}

impl Source {
    fn new(options: &Options, serving: &Arc<Serving>) -> Result<Self, String> {
        if options.cert_mode != CertMode::SelfSigned {
            let path = |path: &Option<PathBuf>| path.clone().unwrap_or_default();
            let (certificate, key) = (path(&options.tls_cert_file), path(&options.tls_key_file));
            return Ok(Self::Files(Files {
                pair: FilePair::new(certificate, key, Arc::clone(serving)),
                authority: options.tls_ca_file.clone().filter(|path| !path.as_os_str().is_empty()),
                pem: Vec::new(),
                bundles: Bundles::default(),
                there: Vec::new(),
                waiting: None,
            }));
        }
        check(options)?;
        let mut names = service_names(&options.service_name, &options.service_namespace);
        names.extend(options.extra_dns_names.iter().cloned());
        let authority = SelfSigned::new(names, lifetimes(options), Arc::clone(serving));
        authority.map(Self::Authority).map_err(|error| error.to_string())
    }
}

/// Mounted files: a pair, and maybe the authority to publish.
struct Files {
    pair: FilePair,
    authority: Option<PathBuf>,
    /// Last content of the authority's file.
    pem: Vec<u8>,
    bundles: Bundles,
    /// Bundles that configurations had at the last look.
    there: Vec<Vec<u8>>,
    /// The leaf of a pair that is not trusted yet, and since when it is.
    waiting: Option<(Vec<u8>, Option<Timestamp>)>,
}

impl Files {
    /// Reads the files; says whether there is something new in them that the cluster should be looked at for.
    ///
    /// A new pair that no API server takes yet waits while the old one is taken.
    fn poll(&mut self, serving: &Serving, now: Timestamp) -> bool {
        let (there, waiting) = (&self.there, &mut self.waiting);
        let may_serve = |new: &Pair| {
            let is_taken = |pair: &Pair| there.iter().all(|bundle| is_trusted(pair.chain(), bundle, now));
            let leaf = new.chain().first().map(|leaf| leaf.to_vec()).unwrap_or_default();
            let since = waiting.take().filter(|(waits, _)| *waits == leaf).map(|(_, since)| since);
            if is_taken(new) {
                let Some(since) = since else { return true };
                let since = since.unwrap_or(now);
                *waiting = Some((leaf, Some(since)));
                return since.checked_add(SETTLE).is_ok_and(|settled| now >= settled);
            }
            let old = serving.pair().filter(|old| old.check_dates(now).is_ok() && is_taken(old));
            if old.is_some() {
                *waiting = Some((leaf, None));
            }
            old.is_none()
        };
        let is_swapped = self.pair.poll(now, may_serve) == Polled::Swapped;
        if is_swapped {
            self.waiting = None;
        }
        let pem = self.authority.as_ref().and_then(|path| std::fs::read(path).ok()).unwrap_or_default();
        let is_new = pem != self.pem;
        self.pem = pem;
        is_swapped || is_new
    }

    /// Problems with the files, as sentences.
    fn problems(&self) -> Vec<String> {
        let mut out = Vec::new();
        if let Some(path) = self.authority.as_ref().filter(|_| self.pem.is_empty()) {
            out.push(format!("{} holds no authority that could be published", path.display()));
        }
        if self.waiting.is_some() {
            out.push("a new certificate waits until every configuration trusts it".to_owned());
        }
        out
    }
}

/// The usual times to settle and to retain, shorter where an authority lives so short that they would not fit.
fn lifetimes(options: &Options) -> Lifetimes {
    let usual = Lifetimes::default();
    Lifetimes {
        authority: options.ca_lifetime,
        leaf: options.leaf_lifetime,
        settle: usual.settle.min(options.ca_lifetime / 12),
        retention: usual.retention.min(options.ca_lifetime / 6),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    Again,
    Waiting,
    Done,
}

/// The parts of the process that a look needs.
struct Keeper {
    options: Arc<Options>,
    client: Client,
    serving: Arc<Serving>,
    health: Arc<Health>,
    metrics: Arc<Metrics>,
    begun: Instant,
}

impl Keeper {
    /// Looks at every configuration, writes what is missing, and tells how it is.
    async fn look(&self, source: &mut Source) -> Result<Progress, String> {
        // Configurations first, the Secret after them: what is published is then never older than what is there.
        let found = Configurations::read(&self.options, &self.client).await;
        let unreadable = found.unreadable();
        if found.nothing_is_readable() {
            self.health.failed(unreadable.clone());
            return Err(unreadable.join("; "));
        }
        let missing = found.conversion_is_missing();
        if missing && self.metrics.conversion_missing.get() == 0 {
            tracing::error!(
                crd = self.options.crd_name,
                "several versions are served without a conversion webhook; objects lose data; run helm upgrade"
            );
        }
        self.metrics.conversion_missing.set(i64::from(missing));
        self.metrics.configurations_missing.set(i64::try_from(found.missing().len()).unwrap_or_default());
        let done = match source {
            Source::Authority(authority) => self.share(authority, &found).await,
            Source::Files(files) => self.follow_files(files, &found).await,
        };
        let mut problems = [found.problems(), unreadable.clone()].concat();
        let done = done.map(|mut looked| {
            problems.append(&mut looked.problems);
            looked
        });
        let (trusted, progress, failures) = match done {
            Ok(looked) => (Some(looked.trusted), looked.progress, looked.failures),
            Err(failure) => (None, Progress::Waiting, vec![failure]),
        };
        problems.extend(failures.iter().cloned());
        let failures = [unreadable, failures].concat();
        match trusted.filter(|_| found.unreadable().is_empty()) {
            Some(trusted) => {
                let is_installed = found.missing().is_empty() || self.begun.elapsed() >= INSTALLED;
                self.health.set(trusted && is_installed, problems);
                if !failures.is_empty() {
                    return Err(failures.join("; "));
                }
                Ok(if progress == Progress::Done && !is_installed { Progress::Waiting } else { progress })
            }
            None => {
                self.health.failed(problems);
                Err(failures.join("; "))
            }
        }
    }

    /// Mode `self`: one step of the shared authority.
    async fn share(&self, authority: &SelfSigned, found: &Configurations) -> Result<Looked, String> {
        let options = &self.options;
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &options.self_secret_namespace);
        let name = &options.self_secret_name;
        let failed = |error: kube::Error| format!("the Secret {name}: {}", cause(&error));
        let secret = secrets.get_opt(name).await.map_err(failed)?;
        let stored: Option<SecretData> = secret.as_ref().map(|secret| {
            secret.data.iter().flatten().map(|(key, value)| (key.clone(), value.0.clone())).collect()
        });
        let observed = found.bundles(options);
        let step = authority.step(stored.as_ref(), &observed, Timestamp::now()).map_err(|e| e.to_string())?;
        let trusted = step.ready || (observed.is_empty() && self.serving.pair().is_some());
        let mut looked = Looked { trusted, progress: Progress::Waiting, ..Looked::default() };
        if !trusted {
            looked
                .problems
                .push("our authority is not in every webhook configuration and the CRD yet".to_owned());
        }
        if let Some(write) = step.write {
            tracing::info!(reason = write.reason, "writing the authority's Secret");
            let data = write.data.into_iter().map(|(key, value)| (key, ByteString(value))).collect();
            let ours = PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() };
            let written = match secret {
                Some(mut secret) => {
                    secret.data = Some(data);
                    secrets.replace(name, &ours, &secret).await
                }
                None => {
                    let metadata = ObjectMeta { name: Some(name.clone()), ..Default::default() };
                    let type_ = Some("Opaque".to_owned());
                    secrets
                        .create(&ours, &Secret { metadata, data: Some(data), type_, ..Default::default() })
                        .await
                }
            };
            looked.progress = Progress::Again;
            return match written {
                Ok(_) => Ok(looked),
                Err(kube::Error::Api(status)) if status.code == 409 => Ok(looked),
                Err(error) => Err(failed(error)),
            };
        }
        if let Some(bundle) = step.publish {
            let wanted = |there: Option<&[u8]>| (there != Some(bundle.as_bytes())).then(|| bundle.clone());
            looked.failures = found.publish(options, &self.client, wanted).await;
            looked.progress = Progress::Again;
        } else if trusted {
            // The bundle is there, but maybe not the rest of what the CRD needs.
            let failures = found.repair(options, &self.client).await;
            looked.progress = if failures.is_some() { Progress::Again } else { Progress::Done };
            looked.failures = failures.unwrap_or_default();
        }
        Ok(looked)
    }

    /// Modes `cert-manager` and `files`: publishes the authority's file if there is one, and sees whether what is served is
    /// trusted.
    async fn follow_files(&self, files: &mut Files, found: &Configurations) -> Result<Looked, String> {
        let (options, now) = (&self.options, Timestamp::now());
        let observed = found.bundles(options);
        files.there = observed.iter().flatten().filter(|bundle| !bundle.is_empty()).cloned().collect();
        let pair = self.serving.pair();
        // Without a bundle the authorities of the system are trusted, which is nothing that somebody here could verify.
        let by_system = options.cert_mode == CertMode::Files && files.authority.is_none();
        let trusted = pair.is_some_and(|pair| {
            observed.iter().all(|bundle| match bundle.as_deref().filter(|bundle| !bundle.is_empty()) {
                Some(bundle) => is_trusted(pair.chain(), bundle, now),
                None => by_system,
            })
        });
        let mut looked = Looked { trusted, problems: files.problems(), ..Looked::default() };
        if !trusted {
            looked.problems.push("not every configuration trusts the served certificate yet".to_owned());
        }
        looked.progress = if trusted { Progress::Done } else { Progress::Waiting };
        if files.authority.is_some() {
            let mut is_written = false;
            let wanted = |there: Option<&[u8]>| {
                let wanted = files.bundles.wanted(&files.pem, there, now);
                is_written |= wanted.is_some();
                wanted
            };
            looked.failures = found.publish(options, &self.client, wanted).await;
            if is_written {
                looked.progress = Progress::Again;
            } else if trusted && let Some(failures) = found.repair(options, &self.client).await {
                looked.progress = Progress::Again;
                looked.failures.extend(failures);
            }
        }
        Ok(looked)
    }
}

/// Findings of a look, and what it did.
struct Looked {
    /// API servers take what is served.
    trusted: bool,
    progress: Progress,
    problems: Vec<String>,
    /// Refusals, with their causes.
    failures: Vec<String>,
}

impl Default for Looked {
    fn default() -> Self {
        Self { trusted: false, progress: Progress::Waiting, problems: Vec::new(), failures: Vec::new() }
    }
}

/// An object as it was read, `None` if it does not exist, or why it could not be read.
type Read<K> = Result<Option<K>, String>;

/// A caBundle, if there is one.
type Bundle = Option<Vec<u8>>;

/// The objects that carry a caBundle for this server, as they were read.
struct Configurations {
    mutating: Read<MutatingWebhookConfiguration>,
    validating: Read<ValidatingWebhookConfiguration>,
    /// Not there, and not missing, where the CRD is another installation's.
    crd: Read<CustomResourceDefinition>,
    /// Names of objects that should be there.
    expected: Vec<(String, bool)>,
}

async fn get<K>(client: &Client, name: &str) -> Read<K>
where
    K: Resource<DynamicType = (), Scope = kube::core::ClusterResourceScope>
        + Clone
        + DeserializeOwned
        + Debug,
{
    let api: Api<K> = Api::all(client.clone());
    api.get_opt(name).await.map_err(|error| format!("{} {name}: {}", K::kind(&()), cause(&error)))
}

fn found<K>(read: &Read<K>) -> Option<&K> {
    read.as_ref().ok().and_then(Option::as_ref)
}

impl Configurations {
    async fn read(options: &Options, client: &Client) -> Self {
        let name = options.webhook_config_name.as_str();
        let crd = async {
            match options.crd() {
                Some(crd) => get(client, crd).await,
                None => Ok(None),
            }
        };
        let (mutating, validating, crd) = tokio::join!(get(client, name), get(client, name), crd);
        let is_gone = |kind: &str, name: &str, gone: bool| (format!("{kind} {name}"), gone);
        let mut expected = vec![
            is_gone("MutatingWebhookConfiguration", name, matches!(mutating, Ok(None))),
            is_gone("ValidatingWebhookConfiguration", name, matches!(validating, Ok(None))),
        ];
        if let Some(name) = options.crd() {
            expected.push(is_gone("CustomResourceDefinition", name, matches!(crd, Ok(None))));
        }
        Self { mutating, validating, crd, expected }
    }

    fn unreadable(&self) -> Vec<String> {
        let all = [self.mutating.as_ref().err(), self.validating.as_ref().err(), self.crd.as_ref().err()];
        all.into_iter().flatten().cloned().collect()
    }

    fn nothing_is_readable(&self) -> bool {
        self.unreadable().len() == self.expected.len()
    }

    /// Objects that should be there and are not.
    fn missing(&self) -> Vec<&str> {
        self.expected.iter().filter(|(_, gone)| *gone).map(|(name, _)| name.as_str()).collect()
    }

    fn of_mutating(&self) -> Vec<(String, Bundle)> {
        let webhooks = found(&self.mutating).into_iter().flat_map(|c| c.webhooks.iter().flatten());
        webhooks.map(|w| (w.name.clone(), w.client_config.ca_bundle.as_ref().map(|b| b.0.clone()))).collect()
    }

    fn of_validating(&self) -> Vec<(String, Bundle)> {
        let webhooks = found(&self.validating).into_iter().flat_map(|c| c.webhooks.iter().flatten());
        webhooks.map(|w| (w.name.clone(), w.client_config.ca_bundle.as_ref().map(|b| b.0.clone()))).collect()
    }

    /// The converter that the CRD names.
    fn converter(&self) -> Option<&Converter> {
        let conversion = found(&self.crd)?.spec.conversion.as_ref()?;
        let webhook = conversion.webhook.as_ref().filter(|_| conversion.strategy == "Webhook")?;
        webhook.client_config.as_ref()
    }

    fn conversion_is_missing(&self) -> bool {
        let versions = found(&self.crd).into_iter().flat_map(|crd| &crd.spec.versions);
        versions.filter(|version| version.served).count() > 1 && self.converter().is_none()
    }

    /// The objects are converted here: the CRD names this Service or URL, and not another installation's.
    fn converts_here(&self, options: &Options) -> bool {
        let Some(converter) = self.converter() else { return false };
        let way = self.way(options);
        if let Some(url) = &converter.url {
            return way.get("url").and_then(Value::as_str) == Some(url);
        }
        let names = |name: Option<&str>, namespace: Option<&str>| {
            converter.service.as_ref().is_some_and(|service| {
                Some(service.name.as_str()) == name && Some(service.namespace.as_str()) == namespace
            })
        };
        let of_way = |part: &str| way.pointer(&format!("/service/{part}")).and_then(Value::as_str);
        names(of_way("name"), of_way("namespace"))
            || names(Some(&options.service_name), Some(&options.service_namespace))
    }

    /// Sentences about what keeps requests from coming here.
    fn problems(&self) -> Vec<String> {
        let mut out: Vec<String> =
            self.missing().into_iter().map(|object| format!("there is no {object}")).collect();
        if self.conversion_is_missing() {
            let name = found(&self.crd).and_then(|crd| crd.metadata.name.as_deref()).unwrap_or_default();
            out.push(format!(
                "{name} serves several versions without a conversion webhook: objects lose data"
            ));
        }
        out
    }

    /// The way of the API server to `/convert`: the one to admission, be that a Service or a URL.
    fn way(&self, options: &Options) -> Value {
        let mutating = found(&self.mutating)
            .into_iter()
            .flat_map(|c| c.webhooks.iter().flatten())
            .map(|w| &w.client_config);
        let validating = found(&self.validating)
            .into_iter()
            .flat_map(|c| c.webhooks.iter().flatten())
            .map(|w| &w.client_config);
        mutating.chain(validating).find_map(way_to_convert).unwrap_or_else(|| {
            json!({"service": {"name": options.service_name, "namespace": options.service_namespace,
                "path": "/convert", "port": 443}})
        })
    }

    /// `None` where nothing is converted, or somewhere else.
    fn of_crd(&self, options: &Options) -> Option<Bundle> {
        if self.conversion_is_missing() {
            return Some(None);
        }
        let converter = self.converter().filter(|_| self.converts_here(options))?;
        Some(converter.ca_bundle.as_ref().map(|bundle| bundle.0.clone()))
    }

    /// The caBundles of everything that calls this server; of what could not be read, none is known.
    fn bundles(&self, options: &Options) -> Vec<Bundle> {
        let of_webhooks =
            [self.of_mutating(), self.of_validating()].concat().into_iter().map(|(_, bundle)| bundle);
        let unknown = self.unreadable().into_iter().map(|_| None);
        of_webhooks.chain(self.of_crd(options)).chain(unknown).collect()
    }

    /// Writes each bundle that should be another one; says what was refused.
    async fn publish(
        &self,
        options: &Options,
        client: &Client,
        mut wanted: impl FnMut(Option<&[u8]>) -> Option<String>,
    ) -> Vec<String> {
        let mut failures = Vec::new();
        let mut of_webhooks = |bundles: Vec<(String, Bundle)>| -> Vec<Value> {
            let changed = bundles.into_iter().filter_map(|(name, there)| {
                let bundle = encoded(&wanted(there.as_deref())?);
                Some(json!({"name": name, "clientConfig": {"caBundle": bundle}}))
            });
            changed.collect()
        };
        let (of_mutating, of_validating) =
            (of_webhooks(self.of_mutating()), of_webhooks(self.of_validating()));
        let (mutating, validating) = (found(&self.mutating), found(&self.validating));
        if let Some(object) = mutating.filter(|_| !of_mutating.is_empty()) {
            failures.extend(patch(client, object, json!({"webhooks": of_mutating})).await.err());
        }
        if let Some(object) = validating.filter(|_| !of_validating.is_empty()) {
            failures.extend(patch(client, object, json!({"webhooks": of_validating})).await.err());
        }
        let Some((crd, there)) = found(&self.crd).zip(self.of_crd(options)) else { return failures };
        let Some(bundle) = wanted(there.as_deref()) else { return failures };
        let bundle = encoded(&bundle);
        let written = if self.conversion_is_missing() {
            tracing::error!(crd = options.crd_name, "the conversion webhook was missing; repairing it");
            self.mend(client, crd, json!({"conversion": self.conversion(options, &bundle)})).await
        } else {
            let conversion = json!({"webhook": {"clientConfig": {"caBundle": bundle}}});
            patch(client, crd, json!({"spec": {"conversion": conversion}})).await.map(drop)
        };
        failures.extend(written.err());
        failures
    }

    fn conversion(&self, options: &Options, bundle: &str) -> Value {
        let mut config = json!({"caBundle": bundle});
        if let (Some(config), Value::Object(way)) = (config.as_object_mut(), self.way(options)) {
            config.extend(way);
        }
        json!({"strategy": "Webhook", "webhook": {"conversionReviewVersions": ["v1"], "clientConfig": config}})
    }

    /// Puts back the version that the controller works with, where a CRD of the AWS Load Balancer Controller was applied over
    /// ours. `None`: it is there.
    async fn repair(&self, options: &Options, client: &Client) -> Option<Vec<String>> {
        let crd = found(&self.crd).filter(|_| self.converts_here(options))?;
        let is_hub = |name: &str| name == Version::V1.name();
        if crd.spec.versions.iter().any(|version| is_hub(&version.name)) {
            return None;
        }
        tracing::error!(crd = options.crd_name, "the CRD has lost its version v1; putting it back");
        let stored = crd.spec.versions.iter().find(|version| version.storage)?;
        let storage = [Version::V1Beta1, Version::V1Alpha1].into_iter().find(|v| v.name() == stored.name)?;
        let mut ours = tgb_api::crd::crd(storage);
        let ours = ours.pointer_mut("/spec/versions").and_then(Value::as_array_mut)?;
        ours.retain(|version| version.get("name").and_then(Value::as_str).is_some_and(is_hub));
        let there = serde_json::to_value(&crd.spec.versions).ok()?;
        let versions = [ours.as_slice(), there.as_array()?.as_slice()].concat();
        Some(self.mend(client, crd, json!({"versions": versions})).await.err().into_iter().collect())
    }

    /// Changes what Helm owns, and leaves it without an owner, so that the next upgrade has no conflict.
    async fn mend(&self, client: &Client, crd: &CustomResourceDefinition, spec: Value) -> Result<(), String> {
        let Some(mended) = patch(client, crd, json!({"spec": spec})).await? else { return Ok(()) };
        let fields = mended.metadata.managed_fields.clone().unwrap_or_default();
        let is_ours = |entry: &ManagedFieldsEntry| entry.manager.as_deref() == Some(MANAGER);
        let others: Vec<_> = fields.iter().filter(|entry| !is_ours(entry)).collect();
        if others.is_empty() || others.len() == fields.len() {
            return Ok(());
        }
        patch(client, &mended, json!({"metadata": {"managedFields": others}})).await.map(drop)
    }
}

fn encoded(bundle: &str) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bundle)
}

/// The way of an admission webhook with `/convert` at its end; `None` where it has none of our paths.
fn way_to_convert(admission: &WebhookClientConfig) -> Option<Value> {
    let ours = |path: &str| {
        path.strip_suffix("/mutate-elbv2-k8s-aws-targetgroupbinding")
            .map(str::to_owned)
            .or_else(|| path.strip_suffix("/validate-elbv2-k8s-aws-targetgroupbinding").map(str::to_owned))
    };
    if let Some(url) = &admission.url {
        return ours(url).map(|base| json!({"url": format!("{base}/convert")}));
    }
    let service = admission.service.as_ref()?;
    let base = ours(service.path.as_deref()?)?;
    Some(json!({"service": {"name": service.name, "namespace": service.namespace,
        "path": format!("{base}/convert"), "port": service.port.unwrap_or(443)}}))
}

/// Applies a change to the object as it was read; `None`: somebody else was first, which is fine.
///
/// The items of lists with names are changed by their names. The API server answers 409 where the object has another
/// resourceVersion by now, so that any other refusal is one.
async fn patch<K>(client: &Client, found: &K, mut change: Value) -> Result<Option<K>, String>
where
    K: Resource<DynamicType = (), Scope = kube::core::ClusterResourceScope>
        + Clone
        + DeserializeOwned
        + Debug,
{
    let (kind, name) = (K::kind(&()), found.meta().name.clone().unwrap_or_default());
    if let Some(change) = change.as_object_mut() {
        let metadata = change.entry("metadata").or_insert_with(|| json!({}));
        if let Some(metadata) = metadata.as_object_mut() {
            metadata.insert("resourceVersion".to_owned(), found.meta().resource_version.clone().into());
        }
    }
    tracing::info!(name, %kind, "writing what API servers need to reach and trust this server");
    let api: Api<K> = Api::all(client.clone());
    let ours = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
    // A definition's lists are whole ones; those of the configurations go by name.
    let patch =
        if kind == "CustomResourceDefinition" { Patch::Merge(change) } else { Patch::Strategic(change) };
    match api.patch(&name, &ours, &patch).await {
        Ok(patched) => Ok(Some(patched)),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(None),
        Err(error) => Err(format!("{kind} {name}: {}", cause(&error))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;
    use hyper::http::{self, Method, Response, StatusCode};
    use std::collections::BTreeMap;

    const CONFIGURATIONS: &str = "/apis/admissionregistration.k8s.io/v1";
    const CRD: &str =
        "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/targetgroupbindings.elbv2.k8s.aws";

    #[derive(clap::Parser)]
    struct Flags {
        #[command(flatten)]
        options: Options,
    }

    /// An API server with these objects by path. What is refused is so with its words.
    #[derive(Default)]
    struct Server {
        objects: BTreeMap<String, Value>,
        refused: BTreeMap<(Method, String), (StatusCode, &'static str)>,
        /// Paths and bodies of writes.
        written: Vec<(String, Value)>,
    }

    type Shared = Arc<Mutex<Server>>;

    impl Server {
        /// Configurations and CRD that call this Service, as a chart makes them.
        fn installed(converter: &str) -> Shared {
            let config = |service: &str, path: &str| json!({"service": {"name": service, "namespace": "tgb-system", "path": path}});
            let mut server = Self::default();
            for (plural, verb) in
                [("mutatingwebhookconfigurations", "mutate"), ("validatingwebhookconfigurations", "validate")]
            {
                let path = format!("/{verb}-elbv2-k8s-aws-targetgroupbinding");
                let object = json!({"metadata": {"name": "tgb", "resourceVersion": "1"}, "webhooks": [
                    {"name": "a.elbv2.k8s.aws", "clientConfig": config("own", &path), "sideEffects": "None", "admissionReviewVersions": ["v1"]}]});
                server.objects.insert(format!("{CONFIGURATIONS}/{plural}/tgb"), object);
            }
            let version = |name: &str| json!({"name": name, "served": true, "storage": name == "v1"});
            let crd = json!({"metadata": {"name": tgb_api::names::CRD, "resourceVersion": "1"}, "spec": {"group": "", "scope": "",
                "names": {"kind": "", "plural": ""}, "versions": [version("v1"), version("v1beta1")],
                "conversion": {"strategy": "Webhook", "webhook": {"conversionReviewVersions": ["v1"],
                    "clientConfig": config(converter, "/convert")}}}});
            server.objects.insert(CRD.to_owned(), crd);
            Arc::new(Mutex::new(server))
        }

        fn answer(&mut self, method: &Method, path: &str, body: &[u8]) -> (StatusCode, Value) {
            let status = |code: StatusCode, message: &str| {
                (
                    code,
                    json!({"kind": "Status", "status": "Failure", "code": code.as_u16(), "message": message, "reason": if code == StatusCode::NOT_FOUND { "NotFound" } else { "Other" }}),
                )
            };
            if let Some((code, message)) = self.refused.get(&(method.clone(), path.to_owned())) {
                return status(*code, message);
            }
            let body: Value = serde_json::from_slice(body).unwrap_or_default();
            if *method == Method::GET {
                return self.objects.get(path).map_or(status(StatusCode::NOT_FOUND, "not found"), |object| {
                    (StatusCode::OK, object.clone())
                });
            }
            self.written.push((path.to_owned(), body.clone()));
            match *method {
                Method::POST => {
                    let name = body.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
                    self.objects.insert(format!("{path}/{name}"), body.clone());
                    (StatusCode::CREATED, body)
                }
                Method::PUT => {
                    self.objects.insert(path.to_owned(), body.clone());
                    (StatusCode::OK, body)
                }
                _ => (StatusCode::OK, self.objects.get(path).cloned().unwrap_or_default()),
            }
        }

        fn client(server: &Shared) -> Client {
            let server = Arc::clone(server);
            let service = tower::service_fn(move |request: http::Request<kube::client::Body>| {
                let server = Arc::clone(&server);
                async move {
                    let (head, body) = request.into_parts();
                    let body = body.collect_bytes().await.unwrap();
                    let (code, answer) = server.lock().unwrap().answer(&head.method, head.uri.path(), &body);
                    let answer = kube::client::Body::from(answer.to_string().into_bytes());
                    Ok::<_, kube::Error>(Response::builder().status(code).body(answer).unwrap())
                }
            });
            Client::new(service, "tgb-system")
        }
    }

    fn keeper(server: &Shared, flags: &[&str]) -> (Keeper, Source) {
        let own = ["x", "--webhook-config-name=tgb", "--service-name=own", "--service-namespace=tgb-system"];
        let options = Arc::new(Flags::parse_from(own.iter().chain(flags)).options);
        let serving = Arc::new(Serving::default());
        let source = Source::new(&options, &serving).unwrap();
        let (health, metrics) = (Arc::default(), Arc::default());
        (
            Keeper {
                options,
                client: Server::client(server),
                serving,
                health,
                metrics,
                begun: Instant::now(),
            },
            source,
        )
    }

    /// Looks until there is nothing more to write, at most five times; the last result, and the paths that were written.
    async fn looks(
        server: &Shared,
        keeper: &Keeper,
        source: &mut Source,
    ) -> (Result<Progress, String>, Vec<String>) {
        let mut last = Ok(Progress::Again);
        for _ in 0..5 {
            last = keeper.look(source).await;
        }
        let mut written: Vec<String> =
            server.lock().unwrap().written.iter().map(|(path, _)| path.clone()).collect();
        written.sort();
        written.dedup();
        (last, written)
    }

    #[tokio::test]
    async fn a_configuration_that_may_not_be_read_or_written_does_not_stop_the_others() {
        let mutating = format!("{CONFIGURATIONS}/mutatingwebhookconfigurations/tgb");
        let validating = format!("{CONFIGURATIONS}/validatingwebhookconfigurations/tgb");
        for (method, code, said) in [
            (Method::GET, StatusCode::FORBIDDEN, "you may not read this"),
            (Method::PATCH, StatusCode::UNPROCESSABLE_ENTITY, "frozen by a policy"),
        ] {
            let server = Server::installed("own");
            server.lock().unwrap().refused.insert((method.clone(), mutating.clone()), (code, said));
            let (keeper, mut source) = keeper(&server, &[]);
            let (last, written) = looks(&server, &keeper, &mut source).await;
            assert!(
                last.as_ref().is_err_and(|error| error.contains(said) && error.contains("tgb")),
                "{last:?}"
            );
            assert!(
                written.contains(&CRD.to_owned()) && written.contains(&validating),
                "{method}: {written:?}"
            );
            assert!(!written.contains(&mutating), "{method}: {written:?}");
            let (ready, problems) = keeper.health.get();
            assert!(!ready && problems.iter().any(|problem| problem.contains(said)), "{problems:?}");
        }
    }

    #[tokio::test]
    async fn a_conflict_is_no_failure() {
        let server = Server::installed("own");
        server
            .lock()
            .unwrap()
            .refused
            .insert((Method::PATCH, CRD.to_owned()), (StatusCode::CONFLICT, "changed meanwhile"));
        let (keeper, mut source) = keeper(&server, &[]);
        assert_eq!(looks(&server, &keeper, &mut source).await.0, Ok(Progress::Again));
        let patches: Vec<Value> =
            server.lock().unwrap().written.iter().map(|(_, body)| body.clone()).collect();
        let patches: Vec<&Value> = patches.iter().filter(|body| body.get("webhooks").is_some()).collect();
        assert!(!patches.is_empty());
        for patch in patches {
            assert_eq!(patch.pointer("/metadata/resourceVersion"), Some(&json!("1")), "{patch}");
            assert_eq!(patch.pointer("/webhooks/0/name"), Some(&json!("a.elbv2.k8s.aws")), "{patch}");
        }
    }

    #[tokio::test]
    async fn a_crd_that_names_another_server_or_is_another_releases_is_left_alone() {
        for (converter, flags) in [("theirs", &[][..]), ("own", &["--crd-name="][..])] {
            let server = Server::installed(converter);
            let (keeper, mut source) = keeper(&server, flags);
            let (_, written) = looks(&server, &keeper, &mut source).await;
            assert_eq!(
                written.iter().filter(|path| path.starts_with(CONFIGURATIONS)).count(),
                2,
                "{written:?}"
            );
            assert!(!written.contains(&CRD.to_owned()), "{converter}: {written:?}");
        }
    }

    #[tokio::test]
    async fn a_crd_that_lost_converter_or_version_gets_it_back() {
        let server = Server::installed("own");
        server.lock().unwrap().objects.get_mut(CRD).unwrap()["spec"]["conversion"] =
            json!({"strategy": "None"});
        let (keeper, mut source) = keeper(&server, &[]);
        let (last, _) = looks(&server, &keeper, &mut source).await;
        assert!(last.is_ok(), "{last:?}");
        let of_crd = |server: &Shared, part: &str| {
            let written = &server.lock().unwrap().written;
            written
                .iter()
                .find_map(|(path, body)| (path == CRD).then(|| body.pointer(part).cloned()).flatten())
        };
        let service = of_crd(&server, "/spec/conversion/webhook/clientConfig/service").unwrap();
        assert_eq!((&service["name"], &service["path"]), (&json!("own"), &json!("/convert")));

        let server = Server::installed("own");
        server.lock().unwrap().objects.get_mut(CRD).unwrap()["spec"]["versions"] =
            json!([{"name": "v1beta1", "served": true, "storage": true}]);
        let found = Configurations::read(&keeper.options, &Server::client(&server)).await;
        assert_eq!(found.repair(&keeper.options, &Server::client(&server)).await, Some(Vec::new()));
        let versions = of_crd(&server, "/spec/versions").unwrap();
        let told: Vec<(&str, &Value)> = versions
            .as_array()
            .unwrap()
            .iter()
            .map(|v| (v["name"].as_str().unwrap(), &v["storage"]))
            .collect();
        assert_eq!(told, [("v1", &json!(false)), ("v1beta1", &json!(true))]);
    }

    #[test]
    fn what_is_refused_is_tried_ever_more_seldom() {
        let seconds: Vec<u64> = (1..8).map(|failures| doubled(SOON, failures).as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 30, 30]);
        assert_eq!(doubled(SOON, u32::MAX), SELDOM);
    }

    fn way(config: Value) -> Option<Value> {
        way_to_convert(&serde_json::from_value(config).unwrap())
    }

    #[test]
    fn a_lost_converter_is_put_back_where_admission_is() {
        let path = "/mutate-elbv2-k8s-aws-targetgroupbinding";
        assert_eq!(
            way(json!({"url": format!("https://192.0.2.1:9443{path}")})),
            Some(json!({"url": "https://192.0.2.1:9443/convert"}))
        );
        assert_eq!(
            way(json!({"service": {"name": "w", "namespace": "n", "path": path, "port": 8443}})),
            Some(json!({"service": {"name": "w", "namespace": "n", "path": "/convert", "port": 8443}}))
        );
        assert_eq!(way(json!({"url": "https://192.0.2.1/mutate-v1-pod"})), None);
    }
}
