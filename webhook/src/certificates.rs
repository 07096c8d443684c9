//! Keeps the served certificate current, and in mode `self` our authority in every configuration.

use crate::metrics::Metrics;
use crate::serve::{CertMode, Options};
use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingWebhookConfiguration,
};
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Client, Resource};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tgb_certs::{FilePair, Lifetimes, SecretData, SelfSigned, Serving, service_names};

const EVERY: Duration = Duration::from_secs(10);
/// While nothing is served or published yet.
const SOON: Duration = Duration::from_secs(1);

/// Keeps `serving` in step until the process ends; `published` is what `/readyz` asks.
pub(crate) async fn keep(
    options: Arc<Options>,
    client: Client,
    serving: Arc<Serving>,
    published: Arc<AtomicBool>,
    metrics: Arc<Metrics>,
) {
    let authority = match options.cert_mode {
        CertMode::SelfSigned => {
            let mut names = service_names(&options.service_name, &options.service_namespace);
            names.extend(options.extra_dns_names.iter().cloned());
            match SelfSigned::new(names, Lifetimes::default(), Arc::clone(&serving)) {
                Ok(authority) => Some(authority),
                Err(error) => {
                    tracing::error!(%error, "no authority can be kept");
                    return;
                }
            }
        }
        CertMode::CertManager | CertMode::Files => None,
    };
    let mut files = FilePair::new(
        options.tls_cert_file.clone().unwrap_or_default(),
        options.tls_key_file.clone().unwrap_or_default(),
        Arc::clone(&serving),
    );
    let mut told = String::new();
    loop {
        let done = match &authority {
            Some(authority) => step(&options, &client, authority, &published, &metrics).await,
            None => {
                files.poll(Timestamp::now());
                published.store(true, Ordering::Relaxed);
                watch_conversion(&options, &client, &metrics).await
            }
        };
        if let Some(end) = serving.state().not_after {
            metrics.certificate_not_after.set(end.as_second());
        }
        let wait = match done {
            Ok(Progress::Again) => Duration::from_millis(50),
            Ok(Progress::Done) => EVERY,
            Ok(Progress::Waiting) => SOON,
            Err(error) => {
                // The same complaint once, not each second.
                if told != error {
                    tracing::warn!(%error, "certificates can't be kept up to date");
                    told = error;
                }
                SOON
            }
        };
        tokio::time::sleep(wait).await;
    }
}

enum Progress {
    Again,
    Waiting,
    Done,
}

async fn step(
    options: &Options,
    client: &Client,
    authority: &SelfSigned,
    published: &AtomicBool,
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
    published.store(step.ready && configurations.complete(), Ordering::Relaxed);
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

async fn watch_conversion(options: &Options, client: &Client, metrics: &Metrics) -> Result<Progress, String> {
    let crd = get(&Api::<CustomResourceDefinition>::all(client.clone()), &options.crd_name).await?;
    let configurations = Configurations { crd, ..Default::default() };
    let missing = configurations.conversion_is_missing();
    if missing && metrics.conversion_missing.get() == 0 {
        tracing::error!(
            crd = options.crd_name,
            "several versions are served without a conversion webhook; objects lose data"
        );
    }
    metrics.conversion_missing.set(i64::from(missing));
    Ok(Progress::Done)
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
                let service = json!({"name": options.service_name, "namespace": options.service_namespace,
                    "path": "/convert", "port": 443});
                let webhook = json!({"conversionReviewVersions": ["v1"],
                    "clientConfig": {"service": service, "caBundle": wanted}});
                vec![
                    json!({"op": "add", "path": "/spec/conversion", "value": {"strategy": "Webhook", "webhook": webhook}}),
                ]
            }
            Some(_) => vec![add("/spec/conversion/webhook/clientConfig/caBundle".to_owned())],
        };
        patch(client, found, &options.crd_name, changes).await
    }
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
