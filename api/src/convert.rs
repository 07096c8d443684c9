//! Conversion between the served versions, on JSON values.
//!
//! v1 is the hub: v1beta1 says the same in another shape; v1alpha1 is v1beta1 with less, and what it cannot say travels in
//! the annotation [`names::CONVERSION_DATA`]. Nothing is parsed into types, so nothing unknown is lost, and values are
//! moved, not copied. `metadata` is never touched but for that annotation.

use crate::crd::Version;
use crate::{json, names};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fmt;
use std::io::Write as _;

/// Why a review fails.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConvertError {
    /// The object or the request names a version that is not served.
    #[error("unknown version {0:?}; served are elbv2.k8s.aws/v1, /v1beta1 and /v1alpha1")]
    UnknownVersion(String),
    /// Not a `TargetGroupBinding`.
    #[error("unknown kind {0:?}; only TargetGroupBinding can be converted")]
    UnknownKind(String),
    /// Not even a JSON object.
    #[error("an object to convert is not a JSON object")]
    NotAnObject,
    /// No JSON, or deeper than is read.
    #[error("an object to convert can't be read: {0}")]
    Unreadable(String),
}

/// Something that a conversion dropped and that the log should tell of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// `namespace/name` of the object.
    pub object: String,
    /// What was dropped, and why. Holds no values.
    pub text: String,
}

/// Converts one object; what is dropped is not told.
///
/// # Errors
/// If the object's version or kind is unknown.
pub fn convert(object: Value, to: Version) -> Result<Value, ConvertError> {
    convert_noting(object, to, &mut Vec::new())
}

/// Converts all objects of a review, or none; keeps their order.
///
/// # Errors
/// If the desired version, or the version or kind of any object, is unknown.
pub fn convert_objects(objects: Vec<Value>, desired_api_version: &str) -> Result<Vec<Value>, ConvertError> {
    convert_objects_noting(objects, desired_api_version, &mut Vec::new())
}

/// As [`convert_objects`], and tells in `notes` what was dropped.
///
/// # Errors
/// If the desired version, or the version or kind of any object, is unknown.
pub fn convert_objects_noting(
    objects: Vec<Value>,
    desired_api_version: &str,
    notes: &mut Vec<Note>,
) -> Result<Vec<Value>, ConvertError> {
    let to = Version::of_api_version(desired_api_version)
        .ok_or_else(|| ConvertError::UnknownVersion(desired_api_version.to_owned()))?;
    objects.into_iter().map(|object| convert_noting(object, to, notes)).collect()
}

/// As [`convert`], and tells in `notes` what was dropped.
///
/// # Errors
/// If the object's version or kind is unknown.
pub fn convert_noting(object: Value, to: Version, notes: &mut Vec<Note>) -> Result<Value, ConvertError> {
    let Value::Object(mut object) = object else { return Err(ConvertError::NotAnObject) };
    let from = version_of(&object)?;
    if from != to {
        drop_nulls(&mut object);
        if !object.get("metadata").is_some_and(Value::is_object) {
            object.insert("metadata".into(), json!({}));
        }
        let mut dropped = Vec::new();
        match from {
            Version::V1 => {}
            Version::V1Beta1 => beta_to_hub(&mut object),
            Version::V1Alpha1 => alpha_to_hub(&mut object, &mut dropped),
        }
        match to {
            Version::V1 => {}
            Version::V1Beta1 => hub_to_beta(&mut object),
            Version::V1Alpha1 => hub_to_alpha(&mut object, &mut dropped),
        }
        object.insert("apiVersion".into(), to.api_version().into());
        if !dropped.is_empty() {
            let label = label(&object);
            notes.extend(dropped.into_iter().map(|text| Note { object: label.clone(), text }));
        }
    }
    Ok(Value::Object(object))
}

/// As [`convert_noting`] from text to text, which is appended to `out`; tells the version that it had. What stays as it is,
/// which is most of an object, is copied as it is written: `metadata` where no annotation has to be looked at, and between
/// v1beta1 and v1 `status` and the members of `spec` that neither moves.
///
/// # Errors
/// If the text is no object, or the object's version or kind is unknown. Then a part may be in `out`.
pub fn convert_text(
    text: &str,
    to: Version,
    out: &mut Vec<u8>,
    notes: &mut Vec<Note>,
) -> Result<Version, ConvertError> {
    if !text.trim_start().starts_with('{') {
        return Err(ConvertError::NotAnObject);
    }
    let (mut object, mut parts) = (Map::new(), Vec::new());
    for (name, member) in members_of(text)? {
        if ["metadata", "spec", "status"].contains(&name.as_str()) {
            parts.push((name, member));
        } else {
            object.insert(name, read(member)?);
        }
    }
    let from = version_of(&object)?;
    let stays = from == to || (from != Version::V1Alpha1 && to != Version::V1Alpha1);
    // Members whose text is copied, in the object and in its `spec`.
    let (mut copied, mut in_spec) = (BTreeMap::new(), BTreeMap::new());
    for (name, text) in parts {
        let is_copied = match name.as_str() {
            _ if !stays || !text.starts_with('{') => false,
            "metadata" => true,
            "status" => has_no_null(text),
            _ => {
                let mut spec = Map::new();
                for (name, text) in members_of(text)? {
                    if is_moved(&name) || !has_no_null(text) {
                        spec.insert(name, read(text)?);
                    } else {
                        spec.insert(name.clone(), Value::Bool(true));
                        in_spec.insert(name, text);
                    }
                }
                object.insert(name, Value::Object(spec));
                continue;
            }
        };
        // Of a name that is there twice only the last counts.
        copied.remove(&name);
        object.insert(name.clone(), if is_copied { json!({}) } else { read(text)? });
        if is_copied {
            copied.insert(name, text);
        }
    }
    let converted = convert_noting(Value::Object(object), to, notes)?;
    let part = |name: &str, member: &Value| in_spec.get(name).filter(|_| *member == Value::Bool(true));
    write(out, &converted, |out, name, member| match copied.get(name) {
        Some(text) => out.write_all(text.as_bytes()),
        None if name == "spec" => write(out, member, |out, name, member| match part(name, member) {
            Some(text) => out.write_all(text.as_bytes()),
            None => Ok(serde_json::to_writer(out, member)?),
        }),
        None => Ok(serde_json::to_writer(out, member)?),
    })
    .map_err(unreadable)?;
    Ok(from)
}

fn unreadable(error: impl fmt::Display) -> ConvertError {
    ConvertError::Unreadable(error.to_string())
}

fn read(text: &str) -> Result<Value, ConvertError> {
    json::read(text).map_err(unreadable)
}

/// Whether nothing in it can be null; what only looks like it costs no more than reading.
fn has_no_null(text: &str) -> bool {
    !text.contains("null")
}

/// Writes an object, whose members `each` writes; anything else as it is.
fn write(
    out: &mut Vec<u8>,
    object: &Value,
    each: impl Fn(&mut Vec<u8>, &str, &Value) -> std::io::Result<()>,
) -> std::io::Result<()> {
    let Value::Object(members) = object else { return Ok(serde_json::to_writer(out, object)?) };
    out.push(b'{');
    for (n, (name, member)) in members.iter().enumerate() {
        if n > 0 {
            out.push(b',');
        }
        serde_json::to_writer(&mut *out, name)?;
        out.push(b':');
        each(out, name, member)?;
    }
    out.push(b'}');
    Ok(())
}

fn members_of(text: &str) -> Result<Vec<(String, &str)>, ConvertError> {
    let members = serde_json::from_str::<Members<'_>>(text).map_err(unreadable)?.0;
    Ok(members.into_iter().map(|(name, member)| (name, member.get())).collect())
}

/// The members of an object, each as it is written.
struct Members<'a>(Vec<(String, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Members<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Members<'de>, A::Error> {
                let mut all = Vec::with_capacity(5);
                while let Some(member) = members.next_entry()? {
                    all.push(member);
                }
                Ok(Members(all))
            }
        }
        deserializer.deserialize_map(Reader)
    }
}

fn version_of(object: &Map<String, Value>) -> Result<Version, ConvertError> {
    let text = |key| object.get(key).and_then(Value::as_str).unwrap_or_default();
    let version = Version::of_api_version(text("apiVersion"))
        .ok_or_else(|| ConvertError::UnknownVersion(text("apiVersion").to_owned()))?;
    if text("kind") != names::KIND {
        return Err(ConvertError::UnknownKind(text("kind").to_owned()));
    }
    Ok(version)
}

fn label(object: &Map<String, Value>) -> String {
    let text = |key| {
        object.get("metadata").and_then(|metadata| metadata.get(key)).and_then(Value::as_str).unwrap_or("?")
    };
    format!("{}/{}", text("namespace"), text("name"))
}

/// Drops members that are null, everywhere but in `metadata`, which is not ours to change: to the API server they are absent.
pub fn drop_nulls(object: &mut Map<String, Value>) {
    fn walk(value: &mut Value) {
        match value {
            Value::Object(members) => {
                if members.values().any(Value::is_null) {
                    members.retain(|_, member| !member.is_null());
                }
                members.values_mut().for_each(walk);
            }
            Value::Array(items) => items.iter_mut().for_each(walk),
            _ => {}
        }
    }
    object.retain(|_, member| !member.is_null());
    object.iter_mut().filter(|(key, _)| *key != "metadata").for_each(|(_, member)| walk(member));
}

// v1beta1 ⇄ v1

/// Fields of v1beta1's `spec` and where they are in v1's `spec.targetGroup`.
const MOVED: [(&str, &str); 6] = [
    ("targetGroupARN", "arn"),
    ("targetGroupName", "name"),
    ("targetType", "targetType"),
    ("targetGroupProtocol", "protocol"),
    ("ipAddressType", "ipAddressType"),
    ("vpcID", "vpcID"),
];
/// The same for v1's `spec.targetGroup.assumeRole`.
const MOVED_ROLE: [(&str, &str); 2] =
    [("iamRoleArnToAssume", "roleARN"), ("assumeRoleExternalId", "externalID")];
const MULTI_CLUSTER: &str = "multiClusterTargetGroup";

/// Whether the conversion between v1beta1 and v1 looks at a member of `spec`.
fn is_moved(name: &str) -> bool {
    [MULTI_CLUSTER, "targetGroup"].contains(&name)
        || MOVED.iter().chain(&MOVED_ROLE).any(|(beta, _)| *beta == name)
}

fn beta_to_hub(object: &mut Map<String, Value>) {
    let Some(spec) = spec(object) else { return };
    // What an old object holds at v1's paths is nobody's; the rest there is unknown to both and stays.
    let (mut group, mut role) = take_group(spec);
    MOVED.iter().for_each(|(_, new)| drop(group.remove(*new)));
    MOVED_ROLE.iter().for_each(|(_, new)| drop(role.remove(*new)));
    group.remove("sharing");

    for (old, new) in MOVED {
        relocate(spec, old, &mut group, new);
    }
    for (old, new) in MOVED_ROLE {
        relocate(spec, old, &mut role, new);
    }
    if let Some(shared) = spec.remove(MULTI_CLUSTER) {
        let sharing = match shared {
            Value::Bool(true) => "Shared".into(),
            Value::Bool(false) => "Exclusive".into(),
            other => other,
        };
        group.insert("sharing".into(), sharing);
    }
    put_group(spec, group, role);
}

fn hub_to_beta(object: &mut Map<String, Value>) {
    let Some(spec) = spec(object) else { return };
    MOVED.iter().chain(&MOVED_ROLE).for_each(|(old, _)| drop(spec.remove(*old)));
    spec.remove(MULTI_CLUSTER);

    let (mut group, mut role) = take_group(spec);
    for (old, new) in MOVED {
        relocate(&mut group, new, spec, old);
    }
    for (old, new) in MOVED_ROLE {
        relocate(&mut role, new, spec, old);
    }
    if let Some(sharing) = group.remove("sharing") {
        let shared = match sharing.as_str() {
            Some("Shared") => true.into(),
            Some("Exclusive") => false.into(),
            _ => sharing,
        };
        spec.insert(MULTI_CLUSTER.into(), shared);
    }
    put_group(spec, group, role);
}

fn spec(object: &mut Map<String, Value>) -> Option<&mut Map<String, Value>> {
    object.get_mut("spec").and_then(Value::as_object_mut)
}

/// `targetGroup` and its `assumeRole`; empty where they are absent or no objects.
fn take_group(spec: &mut Map<String, Value>) -> (Map<String, Value>, Map<String, Value>) {
    let mut group = into_map(spec.remove("targetGroup"));
    let role = into_map(group.remove("assumeRole"));
    (group, role)
}

fn put_group(spec: &mut Map<String, Value>, mut group: Map<String, Value>, role: Map<String, Value>) {
    if !role.is_empty() {
        group.insert("assumeRole".into(), Value::Object(role));
    }
    if !group.is_empty() {
        spec.insert("targetGroup".into(), Value::Object(group));
    }
}

fn into_map(value: Option<Value>) -> Map<String, Value> {
    match value {
        Some(Value::Object(map)) => map,
        _ => Map::new(),
    }
}

fn relocate(from: &mut Map<String, Value>, key: &str, to: &mut Map<String, Value>, new_key: &str) {
    if let Some(value) = from.remove(key) {
        to.insert(new_key.to_owned(), value);
    }
}

// v1alpha1 ⇄ v1, by way of v1beta1's shape

/// Fields of v1beta1 that v1alpha1 lacks.
const SPEC_LACKS: [&str; 4] = ["targetGroupProtocol", "nodeSelector", "ipAddressType", "vpcID"];
const STATUS_LACKS: [&str; 3] = ["targetGroupARN", "conditions", "targets"];
/// Kubernetes allows 256 KiB of annotations per object.
const MOST_KEPT: usize = 200 * 1024;

// The annotation's value is an object of these members, each only if there is something to say:
// `spec`, `status`: what v1alpha1 lacks, by the names of v1beta1; `for`: what it was kept for;
// `own`: what a user had in this annotation; `bare`: there were no annotations before.
const KEPT_SPEC: &str = "spec";
const KEPT_STATUS: &str = "status";
const KEPT_FOR: &str = "for";
const KEPT_OWN: &str = "own";
const KEPT_BARE: &str = "bare";

fn hub_to_alpha(object: &mut Map<String, Value>, dropped: &mut Vec<String>) {
    hub_to_beta(object);
    let kept_for = identity(object);
    let mut kept = Map::new();
    for (member, lacks) in [(KEPT_SPEC, &SPEC_LACKS[..]), (KEPT_STATUS, &STATUS_LACKS[..])] {
        if let Some(Value::Object(from)) = object.get_mut(member) {
            let mut taken = Map::new();
            lacks.iter().for_each(|key| relocate(from, key, &mut taken, key));
            if !taken.is_empty() {
                kept.insert(member.to_owned(), Value::Object(taken));
            }
        }
    }
    let Some(Value::Object(metadata)) = object.get_mut("metadata") else { return };
    if let Some(annotations) = metadata.get_mut("annotations").and_then(Value::as_object_mut) {
        relocate(annotations, names::CONVERSION_DATA, &mut kept, KEPT_OWN);
    }
    if kept.is_empty() {
        return;
    }
    kept.insert(KEPT_FOR.into(), kept_for);
    if metadata.get("annotations").is_none_or(Value::is_null) {
        kept.insert(KEPT_BARE.into(), true.into());
        metadata.insert("annotations".into(), json!({}));
    }
    let mut text = printed(&kept);
    for least in [KEPT_STATUS, KEPT_OWN, KEPT_SPEC] {
        if text.len() > MOST_KEPT && kept.remove(least).is_some() {
            dropped.push(format!("{least} of what v1alpha1 cannot say is over {MOST_KEPT} bytes; dropped"));
            text = printed(&kept);
        }
    }
    if let Some(annotations) = metadata.get_mut("annotations").and_then(Value::as_object_mut) {
        annotations.insert(names::CONVERSION_DATA.into(), text.into());
    }
}

/// As JSON; members in a fixed order, so that a trip there, back and there again is the identity.
fn printed(kept: &Map<String, Value>) -> String {
    serde_json::to_string(kept).unwrap_or_default()
}

fn alpha_to_hub(object: &mut Map<String, Value>, dropped: &mut Vec<String>) {
    for (member, lacks) in [("spec", &SPEC_LACKS[..]), ("status", &STATUS_LACKS[..])] {
        if let Some(Value::Object(from)) = object.get_mut(member) {
            lacks.iter().for_each(|key| drop(from.remove(*key)));
        }
    }
    if let Some(text) = take_kept(object) {
        match json::read(text.as_str().unwrap_or_default()) {
            Ok(Value::Object(kept)) => restore(object, kept, dropped),
            _ => {
                dropped.push(format!("annotation {} is not readable and was dropped", names::CONVERSION_DATA))
            }
        }
    }
    beta_to_hub(object);
}

fn take_kept(object: &mut Map<String, Value>) -> Option<Value> {
    object.get_mut("metadata")?.get_mut("annotations")?.as_object_mut()?.remove(names::CONVERSION_DATA)
}

fn restore(object: &mut Map<String, Value>, mut kept: Map<String, Value>, dropped: &mut Vec<String>) {
    if let Some(Value::Object(metadata)) = object.get_mut("metadata")
        && let Some(Value::Object(annotations)) = metadata.get_mut("annotations")
    {
        if let Some(own @ Value::String(_)) = kept.remove(KEPT_OWN) {
            annotations.insert(names::CONVERSION_DATA.into(), own);
        }
        if annotations.is_empty() && kept.get(KEPT_BARE) == Some(&Value::Bool(true)) {
            metadata.remove("annotations");
        }
    }
    if kept.get(KEPT_FOR) != Some(&identity(object)) {
        dropped
            .push("what v1alpha1 cannot say was kept for another ARN, name or target type; dropped".into());
        return;
    }
    for (member, lacks) in [(KEPT_SPEC, &SPEC_LACKS[..]), (KEPT_STATUS, &STATUS_LACKS[..])] {
        let (Some(Value::Object(mut values)), Some(Value::Object(into))) =
            (kept.remove(member), object.get_mut(member))
        else {
            continue;
        };
        for key in lacks {
            match values.remove(*key) {
                Some(value) if schema::allows(member, key, &value) => {
                    into.insert((*key).to_owned(), value);
                }
                Some(_) => dropped.push(format!("kept {member}.{key} does not match the schema; dropped")),
                None => {}
            }
        }
    }
}

/// What an object in v1beta1's shape is bound to: the kept values are of no use to another target group.
fn identity(object: &Map<String, Value>) -> Value {
    let spec = object.get("spec");
    let member = |key| spec.and_then(|spec| spec.get(key)).cloned().unwrap_or_default();
    json!([member("targetGroupARN"), member("targetGroupName"), member("targetType")])
}

/// What v1's schema says of the values that are kept for v1alpha1. The annotation is the user's to edit, and what comes
/// out of a conversion is not validated again.
mod schema {
    use serde_json::Value;

    pub(super) fn allows(member: &str, key: &str, value: &Value) -> bool {
        match (member, key) {
            ("spec", "targetGroupProtocol") => {
                one_of(value, &["HTTP", "HTTPS", "TCP", "TLS", "UDP", "TCP_UDP", "QUIC", "TCP_QUIC"])
            }
            ("spec", "ipAddressType") => one_of(value, &["ipv4", "ipv6"]),
            ("spec", "vpcID") => text(value, 253),
            ("spec", "nodeSelector") => node_selector(value),
            ("status", "targetGroupARN") => text(value, 256),
            ("status", "conditions") => items(value, condition),
            ("status", "targets") => targets(value),
            _ => false,
        }
    }

    fn one_of(value: &Value, words: &[&str]) -> bool {
        value.as_str().is_some_and(|text| words.contains(&text))
    }

    /// Bounds count characters, as OpenAPI's `maxLength` does.
    fn text(value: &Value, most: usize) -> bool {
        value.as_str().is_some_and(|text| text.len() <= most || text.chars().count() <= most)
    }

    fn items(value: &Value, holds: fn(&Value) -> bool) -> bool {
        value.as_array().is_some_and(|all| all.iter().all(holds))
    }

    fn optional(value: &Value, key: &str, holds: impl Fn(&Value) -> bool) -> bool {
        value.get(key).is_none_or(holds)
    }

    fn required(value: &Value, key: &str, holds: impl Fn(&Value) -> bool) -> bool {
        value.get(key).is_some_and(holds)
    }

    fn node_selector(value: &Value) -> bool {
        let labels =
            |labels: &Value| labels.as_object().is_some_and(|all| all.values().all(Value::is_string));
        let requirement = |each: &Value| {
            required(each, "key", Value::is_string)
                && required(each, "operator", Value::is_string)
                && optional(each, "values", |values| items(values, Value::is_string))
        };
        value.is_object()
            && optional(value, "matchLabels", labels)
            && optional(value, "matchExpressions", |all| {
                all.as_array().is_some_and(|all| all.iter().all(requirement))
            })
    }

    fn condition(value: &Value) -> bool {
        required(value, "type", |it| text(it, 316))
            && required(value, "status", |it| one_of(it, &["True", "False", "Unknown"]))
            && required(value, "reason", |it| text(it, 1024) && it != "")
            && required(value, "message", |it| text(it, 32768))
            && required(value, "lastTransitionTime", time)
            && optional(value, "observedGeneration", Value::is_u64)
    }

    fn targets(value: &Value) -> bool {
        let counts = ["desired", "registered", "healthy", "unhealthy", "draining"];
        value.is_object()
            && counts.iter().all(|key| optional(value, key, Value::is_u64))
            && optional(value, "summary", |it| text(it, 253))
            && optional(value, "observedAt", time)
    }

    fn time(value: &Value) -> bool {
        value.as_str().is_some_and(|text| text.parse::<jiff::Timestamp>().is_ok())
    }
}

#[cfg(test)]
#[path = "convert_tests.rs"]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests;
