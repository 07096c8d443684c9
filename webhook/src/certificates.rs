//! Keeps the served certificate current, and in mode `self` our authority in every configuration.

use crate::metrics::Metrics;
use crate::serve::{CertMode, Options};
use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingWebhookConfiguration, WebhookClientConfig,
};
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Client, Resource};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tgb_certs::{FilePair, Lifetimes, SecretData, SelfSigned, Serving, service_names};
use tokio::time::Instant;

/// Between two looks at the cluster while all is well; the converter is promised to be looked at every minute.
const EVERY: Duration = Duration::from_secs(10);
/// While nothing is served or published yet, and between two looks at mounted files.
const SOON: Duration = Duration::from_secs(1);

/// What `/readyz` asks, and what `/readyz?verbose` says is wrong.
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
    fn failed(&self, problem: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).problems = vec![problem.to_owned()];
    }
}

/// Keeps `serving` in step until the process ends.
pub(crate) async fn keep(
    options: Arc<Options>,
    client: Client,
    serving: Arc<Serving>,
    health: Arc<Health>,
    metrics: Arc<Metrics>,
) {
    let mut source = match Source::new(&options, &serving) {
        Ok(source) => source,
        Err(error) => {
            tracing::error!(%error, "no authority can be kept");
            health.failed(&error);
            return;
        }
    };
    let every = match options.cert_mode {
        CertMode::SelfSigned => EVERY.min(options.leaf_lifetime / 10),
        CertMode::CertManager | CertMode::Files => EVERY,
    };
    let mut told = String::new();
    let mut look = Instant::now();
    loop {
        if let Source::Files(files) = &mut source {
            files.poll(Timestamp::now());
        }
        if Instant::now() >= look {
            let done = match &source {
                Source::Authority(authority) => step(&options, &client, authority, &health, &metrics).await,
                Source::Files(_) => watch(&options, &client, &health, &metrics).await,
            };
            let wait = match done {
                Ok(progress) => {
                    told.clear();
                    match progress {
                        Progress::Again => Duration::from_millis(50),
                        Progress::Done => every,
                        Progress::Waiting => SOON,
                    }
                }
                Err(error) => {
                    // The same complaint once, not each second.
                    if told != error {
                        tracing::warn!(%error, "certificates can't be kept up to date");
                        health.failed(&error);
                        told = error;
                    }
                    SOON
                }
            };
            look = Instant::now() + wait;
        }
        let state = serving.state();
        if let Some(end) = state.not_after {
            metrics.certificate_not_after.set(end.as_second());
        }
        metrics.certificate_refused.set(i64::from(state.last_error.is_some()));
        let next = if matches!(source, Source::Files(_)) { look.min(Instant::now() + SOON) } else { look };
        tokio::time::sleep_until(next).await;
    }
}

/// Where the pair comes from.
enum Source {
    Authority(SelfSigned),
    Files(FilePair),
}

impl Source {
    fn new(options: &Options, serving: &Arc<Serving>) -> Result<Self, String> {
        if options.cert_mode != CertMode::SelfSigned {
            let path = |path: &Option<std::path::PathBuf>| path.clone().unwrap_or_default();
            let files = (path(&options.tls_cert_file), path(&options.tls_key_file));
            return Ok(Self::Files(FilePair::new(files.0, files.1, Arc::clone(serving))));
        }
        let mut names = service_names(&options.service_name, &options.service_namespace);
        names.extend(options.extra_dns_names.iter().cloned());
        let authority = SelfSigned::new(names, lifetimes(options), Arc::clone(serving));
        authority.map(Self::Authority).map_err(|error| {
            format!(
                "--ca-lifetime {:?}, --leaf-lifetime {:?}: {error}",
                options.ca_lifetime, options.leaf_lifetime
            )
        })
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

async fn step(
    options: &Options,
    client: &Client,
    authority: &SelfSigned,
    health: &Health,
    metrics: &Metrics,
) -> Result<Progress, String> {
    // Configurations first, the Secret after them: what is published is then never older than what is there.
    let configurations = Configurations::read(options, client).await?;
    metrics.conversion_missing.set(i64::from(configurations.conversion_is_missing()));
    let secrets: Api<Secret> = Api::namespaced(client.clone(), &options.self_secret_namespace);
    let secret = secrets.get_opt(&options.self_secret_name).await.map_err(|e| format!("the Secret: {e}"))?;
    let stored: Option<SecretData> = secret.as_ref().map(|secret| {
        secret.data.iter().flatten().map(|(key, value)| (key.clone(), value.0.clone())).collect()
    });
    let observed = configurations.bundles();
    let step = authority.step(stored.as_ref(), &observed, Timestamp::now()).map_err(|e| e.to_string())?;
    let mut problems = configurations.problems(options);
    if !step.ready {
        problems.push("our authority is not in every webhook configuration and the CRD yet".to_owned());
    }
    health.set(step.ready && configurations.complete(), problems);
    if let Some(write) = step.write {
        tracing::info!(reason = write.reason, "writing the authority's Secret");
        let data = write.data.into_iter().map(|(key, value)| (key, ByteString(value))).collect();
        let written = match secret {
            Some(mut secret) => {
                secret.data = Some(data);
                secrets.replace(&options.self_secret_name, &PostParams::default(), &secret).await
            }
            None => {
                let metadata =
                    ObjectMeta { name: Some(options.self_secret_name.clone()), ..Default::default() };
                let secret = Secret {
                    metadata,
                    data: Some(data),
                    type_: Some("Opaque".to_owned()),
                    ..Default::default()
                };
                secrets.create(&PostParams::default(), &secret).await
            }
        };
        return match written {
            Ok(_) => Ok(Progress::Again),
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(Progress::Again),
            Err(error) => Err(format!("the Secret: {error}")),
        };
    }
    if let Some(bundle) = step.publish {
        configurations.publish(options, client, &bundle).await?;
        return Ok(if configurations.complete() { Progress::Again } else { Progress::Waiting });
    }
    Ok(if step.ready && configurations.complete() { Progress::Done } else { Progress::Waiting })
}

/// Somebody else writes the caBundles, and repairs the CRD: look whether they did, and raise the alarm if not.
async fn watch(
    options: &Options,
    client: &Client,
    health: &Health,
    metrics: &Metrics,
) -> Result<Progress, String> {
    let configurations = Configurations::read(options, client).await?;
    let missing = configurations.conversion_is_missing();
    if missing && metrics.conversion_missing.get() == 0 {
        tracing::error!(
            crd = options.crd_name,
            "several versions are served without a conversion webhook; objects lose data; run helm upgrade"
        );
    }
    metrics.conversion_missing.set(i64::from(missing));
    let mut problems = configurations.problems(options);
    // With files anything may be trusted, the system's authorities as well; cert-manager always injects.
    let injected = options.cert_mode == CertMode::Files
        || configurations.bundles().iter().all(|bundle| bundle.as_ref().is_some_and(|b| !b.is_empty()));
    if !injected {
        problems.push("cert-manager has not injected its authority everywhere yet".to_owned());
    }
    health.set(injected, problems);
    Ok(if injected { Progress::Done } else { Progress::Waiting })
}

/// What carries a caBundle, as it was read.
#[derive(Default)]
struct Configurations {
    mutating: Option<MutatingWebhookConfiguration>,
    validating: Option<ValidatingWebhookConfiguration>,
    crd: Option<CustomResourceDefinition>,
}

async fn get<K: Resource + Clone + DeserializeOwned + Debug>(
    api: &Api<K>,
    name: &str,
) -> Result<Option<K>, String> {
    api.get_opt(name).await.map_err(|e| format!("{name}: {e}"))
}

/// A caBundle, if there is one.
type Bundle = Option<Vec<u8>>;

impl Configurations {
    async fn read(options: &Options, client: &Client) -> Result<Self, String> {
        Ok(Self {
            mutating: get(&Api::all(client.clone()), &options.webhook_config_name).await?,
            validating: get(&Api::all(client.clone()), &options.webhook_config_name).await?,
            crd: get(&Api::all(client.clone()), &options.crd_name).await?,
        })
    }

    fn complete(&self) -> bool {
        self.mutating.is_some() && self.validating.is_some() && self.crd.is_some()
    }

    fn of_mutating(&self) -> Vec<Bundle> {
        let webhooks = self.mutating.iter().flat_map(|c| c.webhooks.iter().flatten());
        webhooks.map(|w| w.client_config.ca_bundle.as_ref().map(|b| b.0.clone())).collect()
    }

    fn of_validating(&self) -> Vec<Bundle> {
        let webhooks = self.validating.iter().flat_map(|c| c.webhooks.iter().flatten());
        webhooks.map(|w| w.client_config.ca_bundle.as_ref().map(|b| b.0.clone())).collect()
    }

    fn converts(&self) -> bool {
        let conversion = self.crd.as_ref().and_then(|crd| crd.spec.conversion.as_ref());
        conversion.is_some_and(|c| c.strategy == "Webhook" && c.webhook.is_some())
    }

    fn conversion_is_missing(&self) -> bool {
        let served =
            self.crd.iter().flat_map(|crd| &crd.spec.versions).filter(|version| version.served).count();
        served > 1 && !self.converts()
    }

    /// What is missing for requests to come here, as sentences.
    fn problems(&self, options: &Options) -> Vec<String> {
        let mut out = Vec::new();
        let name = &options.webhook_config_name;
        if self.mutating.is_none() {
            out.push(format!("there is no MutatingWebhookConfiguration {name}"));
        }
        if self.validating.is_none() {
            out.push(format!("there is no ValidatingWebhookConfiguration {name}"));
        }
        if self.crd.is_none() {
            out.push(format!("there is no CustomResourceDefinition {}", options.crd_name));
        }
        if self.conversion_is_missing() {
            out.push(format!(
                "{} serves several versions without a conversion webhook: objects lose data",
                options.crd_name
            ));
        }
        out
    }

    /// How the API server should reach `/convert`: as it reaches admission, be that a Service or a URL.
    fn conversion(&self, options: &Options, bundle: &str) -> Value {
        let mutating =
            self.mutating.iter().flat_map(|c| c.webhooks.iter().flatten()).map(|w| &w.client_config);
        let validating =
            self.validating.iter().flat_map(|c| c.webhooks.iter().flatten()).map(|w| &w.client_config);
        let reach = mutating.chain(validating).find_map(way_to_convert).unwrap_or_else(|| {
            json!({"service": {"name": options.service_name, "namespace": options.service_namespace,
                "path": "/convert", "port": 443}})
        });
        let mut config = json!({"caBundle": bundle});
        if let (Some(config), Value::Object(reach)) = (config.as_object_mut(), reach) {
            config.extend(reach);
        }
        json!({"strategy": "Webhook", "webhook": {"conversionReviewVersions": ["v1"], "clientConfig": config}})
    }

    /// `None` where there is nothing to convert.
    fn of_crd(&self) -> Option<Bundle> {
        let crd = self.crd.as_ref()?;
        if !self.converts() && !self.conversion_is_missing() {
            return None;
        }
        let webhook = crd.spec.conversion.as_ref().and_then(|c| c.webhook.as_ref());
        Some(webhook.and_then(|w| w.client_config.as_ref()?.ca_bundle.as_ref()).map(|b| b.0.clone()))
    }

    fn bundles(&self) -> Vec<Bundle> {
        let mut all = self.of_mutating();
        all.extend(self.of_validating());
        all.extend(self.of_crd());
        all
    }

    async fn publish(&self, options: &Options, client: &Client, bundle: &str) -> Result<(), String> {
        use base64::Engine as _;
        let wanted = base64::engine::general_purpose::STANDARD.encode(bundle);
        let add = |path: String| json!({"op": "add", "path": path, "value": wanted});
        let of_webhooks = |bundles: Vec<Bundle>| -> Vec<Value> {
            let stale =
                bundles.into_iter().enumerate().filter(|(_, b)| b.as_deref() != Some(bundle.as_bytes()));
            stale.map(|(i, _)| add(format!("/webhooks/{i}/clientConfig/caBundle"))).collect()
        };
        let name = options.webhook_config_name.as_str();
        if let Some(found) = &self.mutating {
            patch(client, found, name, of_webhooks(self.of_mutating())).await?;
        }
        if let Some(found) = &self.validating {
            patch(client, found, name, of_webhooks(self.of_validating())).await?;
        }
        let Some(found) = &self.crd else { return Ok(()) };
        let changes = match self.of_crd() {
            None => Vec::new(),
            Some(there) if there.as_deref() == Some(bundle.as_bytes()) => Vec::new(),
            Some(_) if self.conversion_is_missing() => {
                tracing::error!(crd = options.crd_name, "the conversion webhook was missing; repairing it");
                let conversion = self.conversion(options, &wanted);
                vec![json!({"op": "add", "path": "/spec/conversion", "value": conversion})]
            }
            Some(_) => vec![add("/spec/conversion/webhook/clientConfig/caBundle".to_owned())],
        };
        patch(client, found, &options.crd_name, changes).await
    }
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

/// Applies changes to the object as it was read; a conflict means that another replica was first, which is fine.
async fn patch<K>(client: &Client, found: &K, name: &str, mut changes: Vec<Value>) -> Result<(), String>
where
    K: Resource<DynamicType = (), Scope = kube::core::ClusterResourceScope>
        + Clone
        + DeserializeOwned
        + Debug,
{
    if changes.is_empty() {
        return Ok(());
    }
    let version = found.meta().resource_version.clone();
    changes.insert(0, json!({"op": "test", "path": "/metadata/resourceVersion", "value": version}));
    tracing::info!(name, kind = %K::kind(&()), "publishing the authority");
    let changes = serde_json::from_value(Value::Array(changes)).map_err(|e| e.to_string())?;
    let api: Api<K> = Api::all(client.clone());
    match api.patch(name, &PatchParams::default(), &Patch::<()>::Json(changes)).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if matches!(status.code, 409 | 422) => Ok(()),
        Err(error) => Err(format!("{name}: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
