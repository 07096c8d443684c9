//! Commands about what is stored: `migrate-storage`, `release --all` and `prepare-uninstall`.
//!
//! The API server writes an object in the CRD's storage version whenever it is written, so migrating is: write every
//! object once as it is. Each write carries the resourceVersion that was read, so nothing that others write meanwhile is
//! lost, and a run that was killed is simply started again.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Client;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::io::IsTerminal;
use tgb_api::names;

const PAGE: usize = 500;
/// An object that others keep writing is tried again this often.
const ATTEMPTS: usize = 5;

/// Why a command failed, in a sentence.
pub(crate) type Failure = String;

/// What a migration did.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Migrated {
    /// Objects written (or, with `dry_run`, that would be).
    pub(crate) written: usize,
    /// Objects that went away meanwhile.
    pub(crate) gone: usize,
    /// Objects that could not be written, with the reason.
    pub(crate) failed: Vec<String>,
}

/// Writes every binding in the CRD's storage version, then drops all other versions from `status.storedVersions`.
///
/// # Errors
/// The API server refuses a list or the CRD; or any object could not be written, and then nothing is dropped.
pub(crate) async fn migrate(client: &Client, dry_run: bool) -> Result<Migrated, Failure> {
    let crd = crd(client).await?;
    let storage = storage_version(&crd)?;
    let known: BTreeSet<String> =
        crd.spec.versions.iter().map(|version| format!("{}/{}", names::GROUP, version.name)).collect();
    let stored = crd.status.as_ref().and_then(|status| status.stored_versions.clone()).unwrap_or_default();
    tell(&format!("storage version {storage}; stored versions: {}", stored.join(", ")));
    let objects = list(client, &storage).await?;
    let bar = progress(objects.len());
    let mut migrated = Migrated::default();
    for object in objects {
        if dry_run {
            migrated.written += 1;
        } else {
            match rewrite(client, object, |object| drop_unknown_managers(object, &known)).await {
                Ok(true) => migrated.written += 1,
                Ok(false) => migrated.gone += 1,
                Err(failure) => migrated.failed.push(failure),
            }
        }
        bar.inc(1);
        if bar.is_hidden() && bar.position().is_multiple_of(500) {
            tell(&format!("{} of {} objects", bar.position(), bar.length().unwrap_or_default()));
        }
    }
    bar.finish_and_clear();
    if dry_run {
        tell(&format!("{} objects would be written; nothing was changed", migrated.written));
        return Ok(migrated);
    }
    tell(&format!("{} objects written, {} gone meanwhile", migrated.written, migrated.gone));
    if let Some(first) = migrated.failed.first() {
        return Err(format!(
            "{} objects could not be written, the first: {first}; stored versions stay as they are, start again",
            migrated.failed.len()
        ));
    }
    trim(client, &storage).await?;
    Ok(migrated)
}

/// Takes our finalizer off every binding, deregistering nothing.
///
/// # Errors
/// What the API server refused; objects before it are done.
pub(crate) async fn release(client: &Client) -> Result<usize, Failure> {
    let mut released = 0;
    for object in list(client, &storage_version(&crd(client).await?)?).await? {
        if has_finalizer(&object) && rewrite(client, object, drop_finalizer).await? {
            released += 1;
        }
    }
    tell(&format!("finalizer taken off {released} bindings; their targets stay registered"));
    Ok(released)
}

/// Leaves a CRD that needs no converter: objects stored in one version, only that one served, conversion `None`.
///
/// # Errors
/// Bindings with our finalizer exist and `force` is not set; or what [`migrate`] says.
pub(crate) async fn prepare_uninstall(client: &Client, keep: &str, force: bool) -> Result<(), Failure> {
    let held: Vec<String> = list(client, &storage_version(&crd(client).await?)?)
        .await?
        .iter()
        .filter(|o| has_finalizer(o))
        .map(id)
        .collect();
    if let Some(first) = held.first() {
        if !force {
            return Err(format!(
                "{} bindings still have our finalizer (the first: {first}); delete them, or run \"tgb-controller release --all\" to keep their targets, or set uninstall.force",
                held.len()
            ));
        }
        tell(&format!("{} bindings still have our finalizer; going on as told", held.len()));
    }
    let mut crd = crd(client).await?;
    if !crd.spec.versions.iter().any(|version| version.name == keep) {
        return Err(format!("the CRD has no version {keep}"));
    }
    if storage_version(&crd)? != keep {
        for version in &mut crd.spec.versions {
            version.storage = version.name == keep;
            version.served |= version.name == keep;
        }
        put_crd(client, "", &crd).await?;
    }
    migrate(client, false).await?;
    let mut crd = self::crd(client).await?;
    for version in &mut crd.spec.versions {
        version.served = version.name == keep;
    }
    crd.spec.conversion = serde_json::from_value(json!({"strategy": "None"})).ok();
    put_crd(client, "", &crd).await?;
    tell(&format!("only {keep} is served, and no converter is needed any more"));
    Ok(())
}

// ---- details ----

fn tell(line: &str) {
    tracing::info!("{line}");
}

fn progress(total: usize) -> ProgressBar {
    let total = u64::try_from(total).unwrap_or(u64::MAX);
    if !std::io::stderr().is_terminal() {
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::hidden());
        return bar;
    }
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} objects, {eta} left");
    let bar = ProgressBar::new(total);
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

fn id(object: &Value) -> String {
    let field =
        |name: &str| object.pointer(&format!("/metadata/{name}")).and_then(Value::as_str).unwrap_or_default();
    format!("{}/{}", field("namespace"), field("name"))
}

fn path(object: &Value) -> Option<String> {
    let field = |pointer: &str| object.pointer(pointer).and_then(Value::as_str);
    let (api_version, namespace, name) =
        (field("/apiVersion")?, field("/metadata/namespace")?, field("/metadata/name")?);
    Some(format!("/apis/{api_version}/namespaces/{namespace}/{}/{name}", names::PLURAL))
}

fn has_finalizer(object: &Value) -> bool {
    let finalizers = object.pointer("/metadata/finalizers").and_then(Value::as_array);
    finalizers.is_some_and(|all| all.iter().any(|finalizer| finalizer == names::FINALIZER))
}

fn storage_version(crd: &CustomResourceDefinition) -> Result<String, Failure> {
    let storage = crd.spec.versions.iter().find(|version| version.storage);
    storage.map(|version| version.name.clone()).ok_or_else(|| "the CRD has no storage version".to_owned())
}

/// Takes out the managed fields of versions that no longer exist.
fn drop_unknown_managers(object: &mut Value, known: &BTreeSet<String>) {
    if let Some(Value::Array(fields)) = object.pointer_mut("/metadata/managedFields") {
        fields.retain(|entry| {
            let version = entry.get("apiVersion").and_then(Value::as_str).unwrap_or_default();
            !version.starts_with(&format!("{}/", names::GROUP)) || known.contains(version)
        });
    }
}

fn drop_finalizer(object: &mut Value) {
    if let Some(Value::Array(finalizers)) = object.pointer_mut("/metadata/finalizers") {
        finalizers.retain(|finalizer| finalizer != names::FINALIZER);
    }
}

/// Writes an object after a change to it; again on a fresh copy if somebody else wrote it meanwhile. `false`: it is gone.
async fn rewrite(client: &Client, mut object: Value, change: impl Fn(&mut Value)) -> Result<bool, Failure> {
    let id = id(&object);
    let Some(path) = path(&object) else {
        return Err(format!("{id}: an object without name or namespace"));
    };
    for _ in 0..ATTEMPTS {
        change(&mut object);
        match send(client, "PUT", &path, Some(&object)).await {
            Ok(_) => return Ok(true),
            Err(kube::Error::Api(status)) if status.code == 404 => return Ok(false),
            Err(kube::Error::Api(status)) if status.code == 409 => {
                match send(client, "GET", &path, None).await {
                    Ok(current) => object = current,
                    Err(kube::Error::Api(status)) if status.code == 404 => return Ok(false),
                    Err(error) => return Err(format!("{id}: {error}")),
                }
            }
            Err(error) => return Err(format!("{id}: {error}")),
        }
    }
    Err(format!("{id}: others keep writing it"))
}

async fn list(client: &Client, version: &str) -> Result<Vec<Value>, Failure> {
    let mut objects = Vec::new();
    let mut more = String::new();
    loop {
        let path = format!("/apis/{}/{version}/{}?limit={PAGE}{more}", names::GROUP, names::PLURAL);
        let mut page =
            send(client, "GET", &path, None).await.map_err(|error| format!("listing bindings: {error}"))?;
        if let Some(Value::Array(items)) = page.get_mut("items").map(Value::take) {
            objects.extend(items);
        }
        match page.pointer("/metadata/continue").and_then(Value::as_str) {
            Some(token) if !token.is_empty() => more = format!("&continue={token}"),
            _ => return Ok(objects),
        }
    }
}

async fn crd(client: &Client) -> Result<CustomResourceDefinition, Failure> {
    let path = format!("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{}", names::CRD);
    let value =
        send(client, "GET", &path, None).await.map_err(|error| format!("reading the CRD: {error}"))?;
    serde_json::from_value(value).map_err(|error| format!("reading the CRD: {error}"))
}

async fn put_crd(client: &Client, subresource: &str, crd: &CustomResourceDefinition) -> Result<(), Failure> {
    let path = format!("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{}{subresource}", names::CRD);
    let body = serde_json::to_value(crd).map_err(|error| error.to_string())?;
    send(client, "PUT", &path, Some(&body))
        .await
        .map(drop)
        .map_err(|error| format!("writing the CRD: {error}"))
}

/// Drops all versions but the storage version from `status.storedVersions`, unless the storage version has changed since.
async fn trim(client: &Client, storage: &str) -> Result<(), Failure> {
    let mut crd = crd(client).await?;
    if storage_version(&crd)? != storage {
        return Err("the storage version changed meanwhile; start again".to_owned());
    }
    let Some(status) = crd.status.as_mut() else { return Ok(()) };
    if status.stored_versions.as_deref() == Some(&[storage.to_owned()]) {
        tell(&format!("stored versions: {storage}"));
        return Ok(());
    }
    status.stored_versions = Some(vec![storage.to_owned()]);
    put_crd(client, "/status", &crd).await?;
    tell(&format!("stored versions: {storage}"));
    Ok(())
}

async fn send(client: &Client, method: &str, path: &str, body: Option<&Value>) -> kube::Result<Value> {
    let body = body.map(serde_json::to_vec).transpose().map_err(kube::Error::SerdeError)?.unwrap_or_default();
    let request =
        http::Request::builder().method(method).uri(path).header("content-type", "application/json");
    let request = request.body(body).map_err(kube::Error::HttpError)?;
    client.request(request).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn managed_fields_go_only_for_versions_that_the_crd_no_longer_has() {
        let mut object = json!({"metadata": {"managedFields": [
            {"manager": "a", "apiVersion": "elbv2.k8s.aws/v1"},
            {"manager": "b", "apiVersion": "elbv2.k8s.aws/v1alpha0"},
            {"manager": "c", "apiVersion": "v1"},
        ]}});
        drop_unknown_managers(&mut object, &BTreeSet::from(["elbv2.k8s.aws/v1".to_owned()]));
        let left = object.pointer("/metadata/managedFields").and_then(Value::as_array).unwrap();
        assert_eq!(left.iter().map(|entry| &entry["manager"]).collect::<Vec<_>>(), ["a", "c"]);
    }

    #[test]
    fn only_our_finalizer_is_taken_off() {
        let mut object = json!({"metadata": {"finalizers": ["x", "elbv2.k8s.aws/resources"]}});
        assert!(has_finalizer(&object));
        drop_finalizer(&mut object);
        assert_eq!(object["metadata"]["finalizers"], json!(["x"]));
    }
}
