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
    /// A patch removes or replaces this as a whole.
    #[error("{0} is removed or replaced as a whole, which the other version can't say; name each field")]
    Whole(&'static str),
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
        move_fields(&mut object, from, to);
    }
    Ok(Value::Object(object))
}

/// Converts a merge patch of an object, as Kustomize's strategic merge patches of bindings are: its nulls, which remove
/// members, and its directives (`$patch`) stay.
///
/// # Errors
/// If the patch's version or kind is unknown, or if it removes or replaces as a whole what the other version has in
/// several places.
pub fn convert_patch(patch: Value, to: Version) -> Result<Value, ConvertError> {
    let Value::Object(mut patch) = patch else { return Err(ConvertError::NotAnObject) };
    let from = version_of(&patch)?;
    let has_directive =
        |members: &Map<String, Value>| members.keys().any(|key| key.starts_with('$') && key != "$patch");
    if let Some(spec) = spec(&mut patch).filter(|_| from != to) {
        if has_directive(spec) {
            return Err(ConvertError::Whole("spec"));
        }
        let group = spec.get(GROUP);
        let role = group.and_then(|group| group.get(ROLE));
        for (path, member) in [("spec.targetGroup", group), ("spec.targetGroup.assumeRole", role)] {
            let is_whole = |value: &Value| {
                value
                    .as_object()
                    .is_none_or(|members| has_directive(members) || members.contains_key("$patch"))
            };
            if from == Version::V1 && member.is_some_and(is_whole) {
                return Err(ConvertError::Whole(path));
            }
        }
    }
    move_fields(&mut patch, from, to);
    Ok(Value::Object(patch))
}

fn move_fields(object: &mut Map<String, Value>, from: Version, to: Version) {
    match (from, to) {
        (Version::V1, Version::V1) => {}
        (Version::V1, _) => hub_to_old(object),
        (_, Version::V1) => old_to_hub(object),
        (Version::V1Beta1 | Version::V1Alpha1, _) => {}
    }
    object.insert("apiVersion".into(), to.api_version().into());
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

const MULTI_CLUSTER: &str = "multiClusterTargetGroup";
const GROUP: &str = "targetGroup";
const ROLE: &str = "assumeRole";

/// Fields that v1 has elsewhere: below `spec` in v1beta1 and v1alpha1, and below `spec` in v1. All but
/// `multiClusterTargetGroup`, a boolean there and a word here, keep their value.
pub const MOVED: [(&str, &str); 9] = [
    ("targetGroupARN", "targetGroup.arn"),
    ("targetGroupName", "targetGroup.name"),
    ("targetType", "targetGroup.targetType"),
    ("targetGroupProtocol", "targetGroup.protocol"),
    ("ipAddressType", "targetGroup.ipAddressType"),
    ("vpcID", "targetGroup.vpcID"),
    (MULTI_CLUSTER, "targetGroup.sharing"),
    ("iamRoleArnToAssume", "targetGroup.assumeRole.roleARN"),
    ("assumeRoleExternalId", "targetGroup.assumeRole.externalID"),
];

/// Tells whether a conversion looks at a member of `spec`.
fn is_moved(name: &str) -> bool {
    name == GROUP || MOVED.iter().any(|(old, _)| *old == name)
}

/// v1's `targetGroup` and its `assumeRole`, the latter taken out of the former.
struct Group {
    members: Map<String, Value>,
    role: Map<String, Value>,
}

impl Group {
    /// Takes it out of a spec; empty where it is absent or not an object.
    fn take(spec: &mut Map<String, Value>) -> Self {
        let mut members = into_map(spec.remove(GROUP));
        let role = into_map(members.remove(ROLE));
        Self { members, role }
    }

    fn put(mut self, spec: &mut Map<String, Value>) {
        if !self.role.is_empty() {
            self.members.insert(ROLE.into(), Value::Object(self.role));
        }
        if !self.members.is_empty() {
            spec.insert(GROUP.into(), Value::Object(self.members));
        }
    }

    /// The object that holds a field of [`MOVED`], and the field's name there.
    fn place<'a>(&mut self, path: &'a str) -> (&mut Map<String, Value>, &'a str) {
        match path.rsplit_once('.') {
            Some((GROUP, name)) => (&mut self.members, name),
            Some((_, name)) => (&mut self.role, name),
            None => (&mut self.members, path),
        }
    }
}

fn old_to_hub(object: &mut Map<String, Value>) {
    let Some(spec) = spec(object) else { return };
    let mut group = Group::take(spec);
    // A value of an old object at v1's paths belongs to nobody; the rest there is unknown to both and stays.
    for (_, path) in MOVED {
        let (members, name) = group.place(path);
        members.remove(name);
    }
    for (old, path) in MOVED {
        if let Some(value) = spec.remove(old) {
            let (members, name) = group.place(path);
            members.insert(name.to_owned(), if old == MULTI_CLUSTER { sharing(value) } else { value });
        }
    }
    group.put(spec);
}

fn hub_to_old(object: &mut Map<String, Value>) {
    let Some(spec) = spec(object) else { return };
    MOVED.iter().for_each(|(old, _)| drop(spec.remove(*old)));
    let mut group = Group::take(spec);
    for (old, path) in MOVED {
        let (members, name) = group.place(path);
        if let Some(value) = members.remove(name) {
            spec.insert(old.to_owned(), if old == MULTI_CLUSTER { multi_cluster(value) } else { value });
        }
    }
    group.put(spec);
}

/// v1's `sharing` for a `multiClusterTargetGroup`; another value than a boolean stays.
pub fn sharing(multi_cluster: Value) -> Value {
    match multi_cluster {
        Value::Bool(true) => "Shared".into(),
        Value::Bool(false) => "Exclusive".into(),
        other => other,
    }
}

/// The `multiClusterTargetGroup` for v1's `sharing`; another value than its words stays.
pub fn multi_cluster(sharing: Value) -> Value {
    match sharing.as_str() {
        Some("Shared") => true.into(),
        Some("Exclusive") => false.into(),
        _ => sharing,
    }
}

fn spec(object: &mut Map<String, Value>) -> Option<&mut Map<String, Value>> {
    object.get_mut("spec").and_then(Value::as_object_mut)
}

fn into_map(value: Option<Value>) -> Map<String, Value> {
    match value {
        Some(Value::Object(map)) => map,
        _ => Map::new(),
    }
}

#[cfg(test)]
#[path = "convert_tests.rs"]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests;
