//! Conversion between the served versions, on JSON values.
//!
//! v1 is the hub. v1beta1 says the same in another shape, and v1alpha1 is v1beta1 by another name. Nothing is parsed into
//! types, so nothing unknown is lost, and values are moved, not copied. `metadata` is never touched.

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

/// Converts one object.
///
/// # Errors
/// If the object's version or kind is unknown.
pub fn convert(object: Value, to: Version) -> Result<Value, ConvertError> {
    let Value::Object(mut object) = object else { return Err(ConvertError::NotAnObject) };
    let from = version_of(&object)?;
    if from != to {
        drop_nulls(&mut object);
        if !object.get("metadata").is_some_and(Value::is_object) {
            object.insert("metadata".into(), json!({}));
        }
        match (from, to) {
            (Version::V1, _) => hub_to_old(&mut object),
            (_, Version::V1) => old_to_hub(&mut object),
            (Version::V1Beta1 | Version::V1Alpha1, _) => {}
        }
        object.insert("apiVersion".into(), to.api_version().into());
    }
    Ok(Value::Object(object))
}

/// Converts one object from text to text, which is appended to `out`; tells the version that it had. Parts that stay as
/// they are, which is most of an object, are copied as they are written: `metadata`, `status`, and the members of `spec`
/// that no version moves.
///
/// # Errors
/// If the text is no object, or the object's version or kind is unknown. Then a part may be in `out`.
pub fn convert_text(text: &str, to: Version, out: &mut Vec<u8>) -> Result<Version, ConvertError> {
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
    // Members whose text is copied, in the object and in its `spec`.
    let (mut copied, mut in_spec) = (BTreeMap::new(), BTreeMap::new());
    for (name, text) in parts {
        let is_copied = match name.as_str() {
            _ if !text.starts_with('{') => false,
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
    let converted = convert(Value::Object(object), to)?;
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

// v1beta1 and v1alpha1 ⇄ v1

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

/// Tells whether a conversion looks at a member of `spec`.
fn is_moved(name: &str) -> bool {
    [MULTI_CLUSTER, "targetGroup"].contains(&name)
        || MOVED.iter().chain(&MOVED_ROLE).any(|(old, _)| *old == name)
}

fn old_to_hub(object: &mut Map<String, Value>) {
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

fn hub_to_old(object: &mut Map<String, Value>) {
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

#[cfg(test)]
#[path = "convert_tests.rs"]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests;
