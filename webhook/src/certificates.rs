//! Where the server's certificate comes from, and how API servers learn to trust it.
//!
//! Decisions are the certificate crate's; this reads and writes what they are about: the shared Secret, both webhook
//! configurations and the CRD's conversion.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingWebhookConfiguration,
};
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, ObjectMeta, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tgb_certs::{FilePair, Lifetimes, SelfSigned, Serving};
use tokio_util::sync::CancellationToken;

/// Between two looks at Secret, configurations or files.
const PERIOD: Duration = Duration::from_secs(10);
/// One request to the API server.
const REQUEST: Duration = Duration::from_secs(10);

/// Names of what mode `self` reads and writes.
#[derive(Debug, Clone)]
pub(crate) struct SelfMode {
    /// Namespace of the Secret.
    pub(crate) secret_namespace: String,
    /// Name of the Secret.
    pub(crate) secret_name: String,
    /// Name of both webhook configurations.
    pub(crate) configurations: String,
    /// Name of the CRD.
    pub(crate) crd: String,
    /// DNS names and addresses of the certificate.
    pub(crate) names: Vec<String>,
    /// How long things live.
    pub(crate) lifetimes: Lifetimes,
}

/// A configuration that has a `caBundle` somewhere.
struct Observed {
    kind: &'static str,
    path: &'static str,
    name: String,
    resource_version: String,
    /// JSON pointers of its bundles, and what is there now.
    bundles: Vec<(String, Option<Vec<u8>>)>,
}

/// Mode `self`: keeps the certificate and every `caBundle` current until `stop`. `ready` follows whether the served
/// certificate is trusted everywhere.
pub(crate) async fn keep_self_signed(
    client: kube::Client,
    mode: SelfMode,
    serving: Arc<Serving>,
    ready: Arc<AtomicBool>,
    stop: CancellationToken,
) -> Result<(), tgb_certs::Error> {
    let own = SelfSigned::new(mode.names.clone(), mode.lifetimes, serving)?;
    let mut told = String::new();
    loop {
        let again = match step(&client, &mode, &own).await {
            Ok((is_ready, again)) => {
                ready.store(is_ready, Ordering::Relaxed);
                told.clear();
                again
            }
            Err(complaint) => {
                // The same complaint every ten seconds helps nobody.
                if told != complaint {
                    tracing::warn!(
                        complaint,
                        "certificate or caBundle could not be kept current; trying again"
                    );
                    told = complaint;
                }
                false
            }
        };
        let pause = if again { Duration::from_millis(50) } else { PERIOD.min(mode.lifetimes.leaf / 10) };
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Mode `files` (and `cert-manager`, whose Secret is mounted): serves what the files hold until `stop`.
pub(crate) async fn keep_files(
    certificate: PathBuf,
    key: PathBuf,
    serving: Arc<Serving>,
    stop: CancellationToken,
) {
    let mut files = FilePair::new(certificate, key, serving);
    loop {
        let polled = tokio::task::spawn_blocking(move || {
            let polled = files.poll(Timestamp::now());
            (files, polled)
        });
        match polled.await {
            Ok((back, polled)) => {
                files = back;
                tracing::debug!(?polled, "certificate files read");
            }
            Err(error) => return tracing::error!(%error, "the reader of the certificate files ended"),
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(PERIOD) => {}
        }
    }
}

/// One look at everything. Gives whether API servers trust what is served, and whether to look again at once.
async fn step(client: &kube::Client, mode: &SelfMode, own: &SelfSigned) -> Result<(bool, bool), String> {
    let observed = observe(client, mode).await?;
    let secrets: Api<Secret> = Api::namespaced(client.clone(), &mode.secret_namespace);
    let secret = timely("reading the Secret of the authority", secrets.get_opt(&mode.secret_name)).await?;
    let stored = secret.as_ref().map(|secret| {
        let data = secret.data.iter().flatten();
        data.map(|(key, value)| (key.clone(), value.0.clone())).collect::<tgb_certs::SecretData>()
    });
    // A configuration without any bundle (its webhooks were all switched off) has nothing to be told.
    let bundles: Vec<Option<Vec<u8>>> =
        observed.iter().flat_map(|one| one.bundles.iter().map(|(_, bundle)| bundle.clone())).collect();
    let step = own.step(stored.as_ref(), &bundles, Timestamp::now()).map_err(|error| error.to_string())?;
    if let Some(write) = step.write {
        tracing::info!(reason = write.reason, secret = mode.secret_name, "writing the authority's Secret");
        let data = write.data.into_iter().map(|(key, value)| (key, ByteString(value))).collect();
        let written = match secret {
            None => {
                let secret = Secret {
                    metadata: ObjectMeta { name: Some(mode.secret_name.clone()), ..Default::default() },
                    type_: Some("Opaque".to_owned()),
                    data: Some(data),
                    ..Default::default()
                };
                tokio::time::timeout(REQUEST, secrets.create(&PostParams::default(), &secret)).await
            }
            Some(mut secret) => {
                secret.data = Some(data);
                let params = PostParams::default();
                tokio::time::timeout(REQUEST, secrets.replace(&mode.secret_name, &params, &secret)).await
            }
        };
        return match written {
            Ok(Ok(_)) => Ok((step.ready, true)),
            // Another replica was faster.
            Ok(Err(kube::Error::Api(status))) if status.code == 409 => Ok((step.ready, true)),
            Ok(Err(error)) => Err(format!("writing the Secret of the authority: {error}")),
            Err(_) => Err("writing the Secret of the authority took too long".to_owned()),
        };
    }
    let Some(bundle) = step.publish else { return Ok((step.ready, false)) };
    for one in &observed {
        publish(client, one, bundle.as_bytes()).await?;
    }
    Ok((step.ready, true))
}

/// Reads both webhook configurations and the CRD. Any of them that isn't there (yet) is nothing to publish to.
async fn observe(client: &kube::Client, mode: &SelfMode) -> Result<Vec<Observed>, String> {
    let mutating: Api<MutatingWebhookConfiguration> = Api::all(client.clone());
    let validating: Api<ValidatingWebhookConfiguration> = Api::all(client.clone());
    let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
    let mut observed = Vec::new();
    if let Some(found) =
        timely("reading the mutating webhooks", mutating.get_opt(&mode.configurations)).await?
    {
        let webhooks = found.webhooks.unwrap_or_default();
        let bundles = webhooks.iter().map(|webhook| webhook.client_config.ca_bundle.as_ref());
        observed.push(webhook_configuration(
            "MutatingWebhookConfiguration",
            "mutatingwebhookconfigurations",
            found.metadata,
            bundles,
        ));
    }
    if let Some(found) =
        timely("reading the validating webhooks", validating.get_opt(&mode.configurations)).await?
    {
        let webhooks = found.webhooks.unwrap_or_default();
        let bundles = webhooks.iter().map(|webhook| webhook.client_config.ca_bundle.as_ref());
        observed.push(webhook_configuration(
            "ValidatingWebhookConfiguration",
            "validatingwebhookconfigurations",
            found.metadata,
            bundles,
        ));
    }
    if let Some(found) = timely("reading the CRD", crds.get_opt(&mode.crd)).await? {
        let conversion = found.spec.conversion.as_ref().and_then(|conversion| conversion.webhook.as_ref());
        let bundles = conversion.and_then(|webhook| webhook.client_config.as_ref()).map(|config| {
            let pointer = "/spec/conversion/webhook/clientConfig/caBundle".to_owned();
            (pointer, config.ca_bundle.as_ref().map(|bundle| bundle.0.clone()))
        });
        observed.push(Observed {
            kind: "CustomResourceDefinition",
            path: "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
            name: found.metadata.name.unwrap_or_default(),
            resource_version: found.metadata.resource_version.unwrap_or_default(),
            bundles: bundles.into_iter().collect(),
        });
    }
    Ok(observed)
}

fn webhook_configuration<'a>(
    kind: &'static str,
    plural: &'static str,
    metadata: ObjectMeta,
    bundles: impl Iterator<Item = Option<&'a ByteString>>,
) -> Observed {
    Observed {
        kind,
        path: match plural {
            "mutatingwebhookconfigurations" => {
                "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations"
            }
            _ => "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations",
        },
        name: metadata.name.unwrap_or_default(),
        resource_version: metadata.resource_version.unwrap_or_default(),
        bundles: bundles
            .enumerate()
            .map(|(index, bundle)| {
                (format!("/webhooks/{index}/clientConfig/caBundle"), bundle.map(|bundle| bundle.0.clone()))
            })
            .collect(),
    }
}

/// Writes the bundle where another one stands; nothing if it stands everywhere.
async fn publish(client: &kube::Client, observed: &Observed, bundle: &[u8]) -> Result<(), String> {
    let stale = observed.bundles.iter().filter(|(_, there)| there.as_deref() != Some(bundle));
    let encoded = BASE64.encode(bundle);
    let mut patch: Vec<Value> =
        stale.map(|(pointer, _)| json!({"op": "add", "path": pointer, "value": encoded})).collect();
    if patch.is_empty() {
        return Ok(());
    }
    patch.insert(
        0,
        json!({"op": "test", "path": "/metadata/resourceVersion", "value": observed.resource_version}),
    );
    let patch: json_patch::Patch =
        serde_json::from_value(Value::Array(patch)).map_err(|error| error.to_string())?;
    let request = kube::core::Request::new(observed.path)
        .patch(&observed.name, &PatchParams::default(), &Patch::<()>::Json(patch))
        .map_err(|error| error.to_string())?;
    match tokio::time::timeout(REQUEST, client.request::<Value>(request)).await {
        Ok(Ok(_)) => {
            tracing::info!(kind = observed.kind, name = observed.name, "caBundle written");
            Ok(())
        }
        // Somebody else changed the object meanwhile; the next look sees how.
        Ok(Err(kube::Error::Api(status))) if matches!(status.code, 409 | 422) => Ok(()),
        Ok(Err(error)) => {
            Err(format!("writing the caBundle of {} {}: {error}", observed.kind, observed.name))
        }
        Err(_) => Err(format!("writing the caBundle of {} {} took too long", observed.kind, observed.name)),
    }
}

async fn timely<T>(doing: &str, request: impl Future<Output = kube::Result<T>>) -> Result<T, String> {
    match tokio::time::timeout(REQUEST, request).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(format!("{doing}: {error}")),
        Err(_) => Err(format!("{doing} took too long")),
    }
}
