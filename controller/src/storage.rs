//! Commands about what is stored: `migrate-storage`, `release --all` and `prepare-uninstall`.
//!
//! The API server writes an object in the CRD's storage version whenever it is written, so migrating is: write every
//! object once as it is. Each write carries the resourceVersion that was read, so nothing that others write meanwhile is
//! lost, and a run that was killed is simply started again.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Client;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::io::IsTerminal;
use tgb_api::names;
use tgb_process::cause;

const PAGE: usize = 500;
/// An object that others keep writing is tried again this often.
const ATTEMPTS: usize = 5;

/// This program among the managers of fields, as its User-Agent has it.
const MANAGER: &str = "tgb-controller";

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

/// The bindings that an installation manages, as the flags of its `run` say.
#[derive(Debug, Clone, Default)]
pub(crate) struct Managed {
    /// Namespaces that it looks at; none: all.
    pub(crate) namespaces: Vec<String>,
    /// It manages the bindings that LBC made for itself, too.
    pub(crate) lbc_bindings: bool,
    /// It runs no controller: every finalizer is another one's.
    pub(crate) nothing: bool,
}

impl Managed {
    fn has(&self, binding: &Value) -> bool {
        let namespace = text(binding, "/metadata/namespace");
        let labels = binding.pointer("/metadata/labels").and_then(Value::as_object);
        let is_of_lbc = labels.into_iter().flatten().any(|(label, _)| names::is_of_lbc(label));
        !self.nothing
            && (self.namespaces.is_empty() || self.namespaces.iter().any(|one| one == namespace))
            && (self.lbc_bindings || !is_of_lbc)
    }

    /// The flags that give the same bindings to another command.
    fn flags(&self) -> String {
        let mut flags = String::new();
        if !self.namespaces.is_empty() {
            flags.push_str(&format!(" --watch-namespaces={}", self.namespaces.join(",")));
        }
        if self.lbc_bindings {
            flags.push_str(" --manage-lbc-bindings");
        }
        flags
    }
}

/// The Helm release that is being uninstalled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Release {
    namespace: String,
    name: String,
}

impl std::str::FromStr for Release {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => {
                Ok(Self { namespace: namespace.to_owned(), name: name.to_owned() })
            }
            _ => Err("write it as NAMESPACE/NAME"),
        }
    }
}

impl Release {
    /// The CRD's other owner, in words; `None`: it is this release, and Helm itself has installed the CRD.
    fn is_not_owner(&self, crd: &CustomResourceDefinition) -> Option<String> {
        let annotation = |name: &str| crd.metadata.annotations.as_ref().and_then(|all| all.get(name));
        match (annotation("meta.helm.sh/release-namespace"), annotation("meta.helm.sh/release-name")) {
            (Some(namespace), Some(name)) if *namespace == self.namespace && *name == self.name => None,
            (Some(namespace), Some(name)) => {
                Some(format!("it belongs to the Helm release {namespace}/{name}"))
            }
            _ => Some("no Helm release has installed it".to_owned()),
        }
    }
}

/// Takes our finalizer off every binding of an installation, deregistering nothing.
///
/// # Errors
/// What the API server refused; objects before it are done.
pub(crate) async fn release(client: &Client, managed: &Managed) -> Result<usize, Failure> {
    let Some(crd) = existing(client).await? else { return Ok(0) };
    let (mut released, mut others) = (0_usize, 0_usize);
    for object in list(client, &storage_version(&crd)?).await? {
        if !has_finalizer(&object) {
            continue;
        }
        if !managed.has(&object) {
            others += 1;
        } else if rewrite(client, object, drop_finalizer).await? {
            released += 1;
        }
    }
    tell(&format!("finalizer taken off {released} bindings; their targets stay registered"));
    if others > 0 {
        tell(&format!("{others} bindings of other installations or of LBC keep theirs"));
    }
    Ok(released)
}

/// The way in which an installation is taken away.
#[derive(Debug, Clone)]
pub(crate) struct Uninstall {
    /// The version that stays.
    pub(crate) keep: String,
    /// Go on although bindings of the installation have our finalizer.
    pub(crate) force: bool,
    /// The bindings that count.
    pub(crate) managed: Managed,
    /// The release that Helm uninstalls; `None`: somebody has asked for it in person.
    pub(crate) release: Option<Release>,
}

/// Leaves a CRD that needs no converter: objects stored in one version, only that one served, conversion `None`. A CRD that
/// is gone needs none either.
///
/// # Errors
/// Bindings of the installation have our finalizer and `force` is not set; or what [`migrate`] says.
pub(crate) async fn prepare_uninstall(client: &Client, uninstall: &Uninstall) -> Result<(), Failure> {
    let Some(crd) = existing(client).await? else { return Ok(()) };
    if let Some(owner) = uninstall.release.as_ref().and_then(|release| release.is_not_owner(&crd)) {
        tell(&format!("the CRD stays as it is: {owner}"));
        return Ok(());
    }
    match leave_one_version(client, &crd, uninstall).await {
        // Whoever deleted it meanwhile was faster.
        Err(failure) => existing(client).await?.map_or(Ok(()), |_| Err(failure)),
        Ok(()) => Ok(()),
    }
}

async fn leave_one_version(
    client: &Client,
    crd: &CustomResourceDefinition,
    uninstall: &Uninstall,
) -> Result<(), Failure> {
    let held = list(client, &storage_version(crd)?).await?;
    let (held, others): (Vec<Value>, Vec<Value>) =
        held.into_iter().filter(has_finalizer).partition(|object| uninstall.managed.has(object));
    if let Some(refusal) = refusal(&held, others.len(), &uninstall.managed) {
        if !uninstall.force {
            return Err(refusal);
        }
        tell(&format!("{} bindings still have our finalizer; going on as told", held.len()));
    }
    let keep = &uninstall.keep;
    if !crd.spec.versions.iter().any(|version| version.name == *keep) {
        return Err(format!("the CRD has no version {keep}"));
    }
    change_crd(client, "", |crd| {
        if storage_version(crd)? == *keep {
            return Ok(false);
        }
        for version in &mut crd.spec.versions {
            version.storage = version.name == *keep;
            version.served |= version.name == *keep;
        }
        Ok(true)
    })
    .await?;
    migrate(client, false).await?;
    change_crd(client, "", |crd| {
        for version in &mut crd.spec.versions {
            version.served = version.name == *keep;
        }
        crd.spec.conversion = serde_json::from_value(json!({"strategy": "None"})).ok();
        Ok(true)
    })
    .await?;
    // Whoever installs the CRD next, by `helm install` or `kubectl apply --server-side`, has no conflict with us.
    change_crd(client, "", |crd| Ok(disown(&mut crd.metadata))).await?;
    tell(&format!("only {keep} is served, and no converter is needed any more"));
    Ok(())
}

/// The refusal of an installation that can't go: its bindings, by namespace, and what to do about them.
fn refusal(held: &[Value], others: usize, managed: &Managed) -> Option<Failure> {
    let first = id(held.first()?);
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for binding in held {
        *counts.entry(text(binding, "/metadata/namespace")).or_default() += 1;
    }
    let counts: Vec<String> = counts.iter().map(|(namespace, n)| format!("{namespace}: {n}")).collect();
    let mut refusal = format!(
        "{} bindings of this installation still have our finalizer ({}; the first is {first}); delete them while the \
         controller runs; or scale it down and run \"tgb-controller release --all{}\" to keep their targets; or set \
         uninstall.force",
        held.len(),
        counts.join(", "),
        managed.flags(),
    );
    if others > 0 {
        refusal.push_str(&format!(". {others} bindings of other installations or of LBC do not count"));
    }
    Some(refusal)
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

fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn id(object: &Value) -> String {
    format!("{}/{}", text(object, "/metadata/namespace"), text(object, "/metadata/name"))
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
                    Err(error) => return Err(format!("{id}: {}", cause(&error))),
                }
            }
            Err(error) => return Err(format!("{id}: {}", cause(&error))),
        }
    }
    Err(format!("{id}: others keep writing it"))
}

async fn list(client: &Client, version: &str) -> Result<Vec<Value>, Failure> {
    let mut objects = Vec::new();
    let mut more = String::new();
    loop {
        let path = format!("/apis/{}/{version}/{}?limit={PAGE}{more}", names::GROUP, names::PLURAL);
        let mut page = send(client, "GET", &path, None)
            .await
            .map_err(|error| format!("listing bindings: {}", cause(&error)))?;
        if let Some(Value::Array(items)) = page.get_mut("items").map(Value::take) {
            objects.extend(items);
        }
        match page.pointer("/metadata/continue").and_then(Value::as_str) {
            Some(token) if !token.is_empty() => more = format!("&continue={token}"),
            _ => return Ok(objects),
        }
    }
}

fn crd_path(subresource: &str) -> String {
    format!("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{}{subresource}", names::CRD)
}

async fn crd(client: &Client) -> Result<CustomResourceDefinition, Failure> {
    let value = send(client, "GET", &crd_path(""), None).await;
    let value = value.map_err(|error| format!("reading the CRD: {}", cause(&error)))?;
    serde_json::from_value(value).map_err(|error| format!("reading the CRD: {error}"))
}

/// The CRD; `None`, and a line that says so, if there is none.
async fn existing(client: &Client) -> Result<Option<CustomResourceDefinition>, Failure> {
    match send(client, "GET", &crd_path(""), None).await {
        Ok(value) => {
            serde_json::from_value(value).map(Some).map_err(|error| format!("reading the CRD: {error}"))
        }
        Err(kube::Error::Api(status)) if status.code == 404 => {
            tell(&format!("there is no CustomResourceDefinition {}; nothing is left to do", names::CRD));
            Ok(None)
        }
        Err(error) => Err(format!("reading the CRD: {}", cause(&error))),
    }
}

/// Reads the CRD, changes it and writes it unless `change` says that nothing is to be written; again if somebody else wrote
/// it meanwhile.
async fn change_crd(
    client: &Client,
    subresource: &str,
    change: impl Fn(&mut CustomResourceDefinition) -> Result<bool, Failure>,
) -> Result<(), Failure> {
    for _ in 0..ATTEMPTS {
        let mut crd = crd(client).await?;
        if !change(&mut crd)? {
            return Ok(());
        }
        let body = serde_json::to_value(crd).map_err(|error| error.to_string())?;
        match send(client, "PUT", &crd_path(subresource), Some(&body)).await {
            Ok(_) => return Ok(()),
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(error) => return Err(format!("writing the CRD: {}", cause(&error))),
        }
    }
    Err("writing the CRD: others keep writing it".to_owned())
}

/// Takes this program's name off what it has written, so that nobody has a conflict with it. Without any name left the next
/// apply would conflict with "before-first-apply", so that a name that is the only one stays.
fn disown(metadata: &mut ObjectMeta) -> bool {
    let Some(fields) = metadata.managed_fields.as_mut() else { return false };
    let is_ours = |manager: Option<&str>, part: Option<&str>| manager == Some(MANAGER) && part.is_none();
    let before = fields.len();
    let kept: Vec<_> = fields
        .iter()
        .filter(|entry| !is_ours(entry.manager.as_deref(), entry.subresource.as_deref()))
        .cloned()
        .collect();
    if kept.is_empty() || kept.len() == before {
        return false;
    }
    *fields = kept;
    true
}

/// Drops all versions but the storage version from `status.storedVersions`, unless the storage version has changed since.
async fn trim(client: &Client, storage: &str) -> Result<(), Failure> {
    change_crd(client, "/status", |crd| {
        if storage_version(crd)? != storage {
            return Err("the storage version changed meanwhile; start again".to_owned());
        }
        let only = vec![storage.to_owned()];
        let Some(status) =
            crd.status.as_mut().filter(|status| status.stored_versions.as_ref() != Some(&only))
        else {
            return Ok(false);
        };
        status.stored_versions = Some(only);
        Ok(true)
    })
    .await?;
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

    fn bound(namespace: &str, labels: &Value) -> Value {
        json!({"metadata": {"namespace": namespace, "name": "web", "labels": labels, "finalizers": [names::FINALIZER]}})
    }

    #[test]
    fn an_installation_manages_the_bindings_that_its_flags_say() {
        let of_lbc = json!({"service.k8s.aws/stack-name": "a"});
        let (own, other, lbc) =
            (bound("shop", &json!({})), bound("blog", &json!({"app": "a"})), bound("shop", &of_lbc));
        let all = Managed::default();
        let some = Managed { namespaces: vec!["shop".to_owned()], ..Managed::default() };
        let with_lbc = Managed { lbc_bindings: true, ..some.clone() };
        let none = Managed { nothing: true, ..Managed::default() };
        for (managed, expected) in [
            (&all, [true, true, false]),
            (&some, [true, false, false]),
            (&with_lbc, [true, false, true]),
            (&none, [false; 3]),
        ] {
            assert_eq!([&own, &other, &lbc].map(|binding| managed.has(binding)), expected, "{managed:?}");
        }
    }

    #[test]
    fn a_refusal_names_the_namespaces_and_the_command_for_these_bindings_alone() {
        let held = [bound("shop", &json!({})), bound("blog", &json!({})), bound("shop", &json!({}))];
        let some = Managed { namespaces: vec!["shop".to_owned(), "blog".to_owned()], ..Managed::default() };
        let said = refusal(&held, 4, &some).unwrap();
        for part in [
            "3 bindings of this installation",
            "blog: 1, shop: 2; the first is shop/web",
            "\"tgb-controller release --all --watch-namespaces=shop,blog\"",
            "4 bindings of other installations or of LBC do not count",
        ] {
            assert!(said.contains(part), "{part} is not in: {said}");
        }
        assert_eq!(refusal(&[], 4, &some), None);
    }

    #[test]
    fn a_hook_acts_for_the_release_that_owns_the_crd_and_for_no_other() {
        let crd = |annotations: Value| -> CustomResourceDefinition {
            serde_json::from_value(
                json!({"metadata": {"annotations": annotations}, "spec": {"group": "", "names":
                {"kind": "", "plural": ""}, "scope": "", "versions": []}}),
            )
            .unwrap()
        };
        let release: Release = "tgb-system/tgb".parse().unwrap();
        let of = |namespace: &str, name: &str| json!({"meta.helm.sh/release-namespace": namespace, "meta.helm.sh/release-name": name});
        assert_eq!(release.is_not_owner(&crd(of("tgb-system", "tgb"))), None);
        let other = release.is_not_owner(&crd(of("tgb-system", "other"))).unwrap();
        assert!(other.contains("tgb-system/other"), "{other}");
        assert!(release.is_not_owner(&crd(json!({}))).is_some(), "rendered, and applied by something else");
        for wrong in ["tgb", "/tgb", "tgb-system/"] {
            assert!(wrong.parse::<Release>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_was_written_is_disowned_unless_nobody_else_owns_anything() {
        let entry = |manager: &str, part: Option<&str>| {
            serde_json::from_value(json!({"manager": manager, "operation": "Update", "subresource": part}))
                .unwrap()
        };
        let mut metadata = ObjectMeta {
            managed_fields: Some(vec![
                entry("helm", None),
                entry(MANAGER, None),
                entry(MANAGER, Some("status")),
            ]),
            ..ObjectMeta::default()
        };
        assert!(disown(&mut metadata));
        assert_eq!(metadata.managed_fields, Some(vec![entry("helm", None), entry(MANAGER, Some("status"))]));
        assert!(!disown(&mut metadata), "there is nothing left to take off");
        let mut alone =
            ObjectMeta { managed_fields: Some(vec![entry(MANAGER, None)]), ..ObjectMeta::default() };
        assert!(!disown(&mut alone));
    }

    #[test]
    fn only_our_finalizer_is_taken_off() {
        let mut object = json!({"metadata": {"finalizers": ["x", "elbv2.k8s.aws/resources"]}});
        assert!(has_finalizer(&object));
        drop_finalizer(&mut object);
        assert_eq!(object["metadata"]["finalizers"], json!(["x"]));
    }
}
