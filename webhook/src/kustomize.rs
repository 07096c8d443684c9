//! Patches of bindings in the format of Kustomize, wherever a document holds them: kustomizations and components, and
//! Flux's and Argo CD's objects that embed the same lists.
//!
//! - [`convert`]: those of a document, to another version.
//! - [`convert_patch`]: one patch, inline or the document of a file.
//! - [`patches`]: what a document patches, for `lint`, which does not apply patches.

use serde_json::{Value, json};
use std::fmt;
use tgb_api::convert::{self, ConvertError, MOVED, multi_cluster, sharing};
use tgb_api::crd::Version;
use tgb_api::names;

use crate::rewrite::is_binding;

/// Why a patch can't be converted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PatchError {
    /// It may be for bindings and for other objects.
    #[error("{0} patches fields that move, and its target may be other objects as well; name group {group} and kind {kind}", group = names::GROUP, kind = names::KIND)]
    Target(Place),
    /// The version of a target or object is a pattern.
    #[error("{0} selects bindings by the version {1:?}; write {2}")]
    Version(Place, String, &'static str),
    /// An operation would change another number of fields in the other version.
    #[error("{0}: {op} of {path} can't be converted by itself; {instead}", op = .1.op, path = .1.path, instead = .1.instead)]
    Operation(Place, Box<Operation>),
    /// A strategic merge patch that the other version can't say.
    #[error("{0}: {1}")]
    Merge(Place, ConvertError),
    /// A list that Kustomize makes no use of any more.
    #[error("{0} reads a field of bindings; write it as replacements")]
    Vars(Place),
    /// A patch that is not YAML.
    #[error("{0} can't be read: {1}")]
    Unreadable(Place, String),
}

/// A JSON 6902 operation that can't be converted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Operation {
    op: String,
    path: String,
    instead: &'static str,
}

/// Where a patch is in its document, as in `patches[0]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place(String);

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// True if a patch is for bindings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Ours {
    No,
    /// Its target names no kind, or a pattern.
    Perhaps,
    Yes,
}

/// A file that a document patches with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PatchFile {
    /// The path as written, from the document's directory.
    pub(crate) path: String,
    /// True if its patches are for bindings; what they say of themselves counts as well.
    pub(crate) ours: Ours,
}

/// The member that holds a patch, or the path of one.
const IN: [&str; 2] = ["patch", "path"];
const AMBIGUOUS: [char; 10] = ['*', '+', '?', '|', '(', ')', '[', ']', '^', '$'];

/// Converts the patches and replacements of a document, and their targets; gives the number of those that changed and the
/// files of the others.
///
/// # Errors
/// If one can't be converted.
pub(crate) fn convert(document: &mut Value, to: Version) -> Result<(usize, Vec<PatchFile>), PatchError> {
    let mut found = Converter { to, count: 0, files: Vec::new() };
    found.walk(document)?;
    Ok((found.count, found.files))
}

/// The patches of a document that are for bindings, or may be, as `patches[0]`.
pub(crate) fn patches(document: &Value) -> Vec<String> {
    let mut all = Vec::new();
    let mut walk = |value: &Value| {
        for (list, items) in lists(value) {
            for (n, item) in items.iter().enumerate() {
                let place = Place(format!("{list}[{n}]"));
                let ours = match (list, item) {
                    ("replacements", _) => replaced(item),
                    (_, Value::String(text)) => in_text(text, Ours::No, &place),
                    _ => {
                        let ours = target(item.get("target"));
                        match item.get("patch") {
                            Some(Value::String(text)) => in_text(text, ours, &place),
                            Some(patch) => in_patch(patch, ours),
                            None => ours,
                        }
                    }
                };
                if ours == Ours::Yes {
                    all.push(place.0);
                }
            }
        }
    };
    each_object(document, &mut walk);
    all
}

/// True if the text of a patch is for bindings, where its target is `ours`.
fn in_text(text: &str, ours: Ours, place: &Place) -> Ours {
    let read = parse(text, place).unwrap_or_default();
    read.iter().map(|patch| in_patch(patch, ours)).max().unwrap_or(ours)
}

fn in_patch(patch: &Value, ours: Ours) -> Ours {
    if is_binding(patch) || (ours == Ours::Perhaps && touches(patch)) { Ours::Yes } else { ours }
}

fn each_object(value: &Value, visit: &mut impl FnMut(&Value)) {
    match value {
        Value::Object(members) => {
            visit(value);
            members.values().for_each(|member| each_object(member, visit));
        }
        Value::Array(items) => items.iter().for_each(|item| each_object(item, visit)),
        _ => {}
    }
}

const LISTS: [&str; 4] = ["patches", "patchesJson6902", "patchesStrategicMerge", "replacements"];

/// Lists of patches that an object has.
fn lists(object: &Value) -> impl Iterator<Item = (&'static str, &Vec<Value>)> {
    LISTS.into_iter().filter_map(|list| Some((list, object.get(list)?.as_array()?)))
}

/// True if a replacement reads or writes bindings.
fn replaced(replacement: &Value) -> Ours {
    let targets = replacement.get("targets").and_then(Value::as_array).into_iter().flatten();
    let selected = targets.map(|each| target(each.get("select")));
    selected.chain(replacement.get("source").map(|source| target(Some(source)))).max().unwrap_or(Ours::No)
}

/// True if a selector of Kustomize's selects bindings.
fn target(selector: Option<&Value>) -> Ours {
    let part = |key: &str, ours: &str| match selector.and_then(|it| it.get(key)).and_then(Value::as_str) {
        None | Some("") => Ours::Perhaps,
        Some(text) if text == ours => Ours::Yes,
        Some(text) if text.contains(AMBIGUOUS) => Ours::Perhaps,
        Some(_) => Ours::No,
    };
    match (part("group", names::GROUP), part("kind", names::KIND)) {
        (Ours::No, _) | (_, Ours::No) => Ours::No,
        (_, Ours::Yes) => Ours::Yes,
        _ => Ours::Perhaps,
    }
}

/// True if a patch names a field that another version has elsewhere.
fn touches(patch: &Value) -> bool {
    match patch {
        Value::Array(operations) => operations.iter().any(|operation| {
            let points = |key| operation.get(key).and_then(Value::as_str).is_some_and(is_pointer);
            points("path") || points("from")
        }),
        Value::Object(_) => patch.get("spec").and_then(Value::as_object).is_some_and(|spec| {
            spec.contains_key("targetGroup") || MOVED.iter().any(|(old, _)| spec.contains_key(*old))
        }),
        _ => false,
    }
}

fn is_pointer(pointer: &str) -> bool {
    let field = pointer.strip_prefix("/spec/").and_then(|rest| rest.split('/').next());
    field.is_some_and(|field| field == "targetGroup" || MOVED.iter().any(|(old, _)| *old == field))
}

/// The values of a patch's text.
fn parse(text: &str, place: &Place) -> Result<Vec<Value>, PatchError> {
    crate::rewrite::documents(text)
        .iter()
        .filter_map(|document| document.parse().transpose())
        .map(|read| match read {
            Ok(node) => Ok(node.value.value()),
            Err(problem) => Err(PatchError::Unreadable(place.clone(), problem.message)),
        })
        .collect()
}

struct Converter {
    to: Version,
    count: usize,
    files: Vec<PatchFile>,
}

impl Converter {
    fn walk(&mut self, value: &mut Value) -> Result<(), PatchError> {
        match value {
            Value::Object(members) => {
                for (list, member) in members.iter_mut() {
                    let known = LISTS.into_iter().find(|known| known == list);
                    match (known, member) {
                        (Some(list), Value::Array(items)) => {
                            for (n, item) in items.iter_mut().enumerate() {
                                self.item(list, &Place(format!("{list}[{n}]")), item)?;
                            }
                        }
                        (_, Value::Array(items)) if list == "vars" => {
                            let reads = |item: &Value| {
                                item.get("objref").is_some_and(|it| target(Some(it)) == Ours::Yes)
                            };
                            if let Some(n) = items.iter().position(reads) {
                                return Err(PatchError::Vars(Place(format!("vars[{n}]"))));
                            }
                        }
                        (_, member) => self.walk(member)?,
                    }
                }
            }
            Value::Array(items) => items.iter_mut().try_for_each(|item| self.walk(item))?,
            _ => {}
        }
        Ok(())
    }

    fn item(&mut self, list: &str, place: &Place, item: &mut Value) -> Result<(), PatchError> {
        let before = item.clone();
        if list == "replacements" {
            self.replacement(place, item)?;
        } else if let Value::String(text) = item {
            self.text(place, text, Ours::No, list == "patchesStrategicMerge")?;
        } else {
            let ours = target(item.get("target"));
            let mut touched = false;
            for key in IN {
                match item.get_mut(key) {
                    Some(Value::String(text)) => {
                        touched |= in_text(text, Ours::No, place) == Ours::Yes
                            || parse(text, place).is_ok_and(|all| all.iter().any(touches));
                        self.text(place, text, ours, key == "path")?;
                    }
                    Some(patch) if key == "patch" => {
                        touched |= touches(patch);
                        *patch = convert_patch(place, patch.take(), ours, self.to)?;
                    }
                    _ => {}
                }
            }
            if let Some(selector) = item.get_mut("target") {
                self.version(place, selector, ours, touched)?;
            }
        }
        self.count += usize::from(*item != before);
        Ok(())
    }

    /// A patch as a text, or the path of a file with one.
    fn text(
        &mut self,
        place: &Place,
        text: &mut String,
        ours: Ours,
        may_be_path: bool,
    ) -> Result<(), PatchError> {
        let is_patch = |value: &Value| value.is_object() || value.is_array();
        if may_be_path && !parse(text, place).is_ok_and(|all| all.iter().any(is_patch)) {
            self.files.push(PatchFile { path: text.clone(), ours });
            return Ok(());
        }
        let to = self.to;
        let edit = |value: &mut Value| -> Result<bool, PatchError> {
            let new = convert_patch(place, value.clone(), ours, to)?;
            let changed = new != *value;
            *value = new;
            Ok(changed)
        };
        *text =
            crate::rewrite::edited(text, to, edit, |message| PatchError::Unreadable(place.clone(), message))?;
        Ok(())
    }

    /// Writes the version of a selector of bindings.
    fn version(
        &self,
        place: &Place,
        selector: &mut Value,
        ours: Ours,
        touched: bool,
    ) -> Result<(), PatchError> {
        let Some(Value::String(version)) = selector.get_mut("version") else { return Ok(()) };
        let known = Version::ALL.iter().any(|known| known.name() == version.as_str());
        let to = self.to.name();
        match ours {
            Ours::Yes if known => to.clone_into(version),
            // These are for every version.
            Ours::Yes if [".*", "v1.*", ""].contains(&version.as_str()) => {}
            Ours::Yes => return Err(PatchError::Version(place.clone(), version.clone(), to)),
            Ours::Perhaps if known && touched => return Err(PatchError::Target(place.clone())),
            Ours::Perhaps | Ours::No => {}
        }
        Ok(())
    }

    fn replacement(&mut self, place: &Place, item: &mut Value) -> Result<(), PatchError> {
        if let Some(path) = item.get("path").and_then(Value::as_str) {
            self.files.push(PatchFile { path: path.to_owned(), ours: Ours::No });
        }
        if let Some(source) = item.get_mut("source") {
            let ours = target(Some(source));
            let touched = match source.get_mut("fieldPath") {
                Some(Value::String(path)) if ours != Ours::No => {
                    self.field_path(place, path, ours, "read")?
                }
                _ => false,
            };
            self.version(place, source, ours, touched)?;
        }
        for each in item.get_mut("targets").and_then(Value::as_array_mut).into_iter().flatten() {
            let ours = target(each.get("select"));
            let mut touched = false;
            if ours != Ours::No {
                for path in each.get_mut("fieldPaths").and_then(Value::as_array_mut).into_iter().flatten() {
                    if let Value::String(path) = path {
                        touched |= self.field_path(place, path, ours, "replace")?;
                    }
                }
            }
            if let Some(select) = each.get_mut("select") {
                self.version(place, select, ours, touched)?;
            }
        }
        Ok(())
    }

    /// Converts a path such as `spec.targetGroupARN`; tells whether it is one that moves.
    fn field_path(&self, place: &Place, path: &mut String, ours: Ours, op: &str) -> Result<bool, PatchError> {
        let pointer = format!("/{}", path.replace('.', "/"));
        if !is_pointer(&pointer) {
            return Ok(false);
        }
        if ours == Ours::Perhaps {
            return Err(PatchError::Target(place.clone()));
        }
        let pointer = moved(place, op, &pointer, self.to)?;
        if is_sharing(&pointer) && pointer != format!("/{}", path.replace('.', "/")) {
            let instead = "its value is a boolean in one version and a word in the other";
            return Err(refused(place, op, path, instead));
        }
        *path = pointer.trim_start_matches('/').replace('/', ".");
        Ok(true)
    }
}

/// Converts a patch that is for bindings: a list of JSON 6902 operations, or a strategic merge patch. Any other stays.
///
/// # Errors
/// If it can't be converted, or may be for other objects as well.
pub(crate) fn convert_patch(
    place: &Place,
    patch: Value,
    ours: Ours,
    to: Version,
) -> Result<Value, PatchError> {
    let merge = |patch, to| {
        convert::convert_patch(patch, to).map_err(|error| PatchError::Merge(place.clone(), error))
    };
    if is_binding(&patch) {
        return merge(patch, to);
    }
    match (ours, touches(&patch)) {
        (Ours::No, _) | (_, false) => Ok(patch),
        (Ours::Perhaps, true) => Err(PatchError::Target(place.clone())),
        (Ours::Yes, true) => match patch {
            Value::Array(operations) => {
                operations.into_iter().map(|each| operation(place, each, to)).collect()
            }
            // Kustomize takes the object from the target; the patch's own version and kind may be anything.
            Value::Object(mut members) => {
                let from = if to == Version::V1 { Version::V1Beta1 } else { Version::V1 };
                let own = ["apiVersion", "kind"].map(|key| (key, members.remove(key)));
                members.insert("apiVersion".to_owned(), json!(from.api_version()));
                members.insert("kind".to_owned(), json!(names::KIND));
                let mut new = merge(Value::Object(members), to)?;
                for (key, value) in own {
                    if let Value::Object(members) = &mut new {
                        members.remove(key);
                        members.extend(value.map(|value| (key.to_owned(), value)));
                    }
                }
                Ok(new)
            }
            other => Ok(other),
        },
    }
}

/// A file's patch, as its own place.
pub(crate) fn in_file(path: &str) -> Place {
    Place(path.to_owned())
}

/// True if a value is a list of JSON 6902 operations of which some are on fields that move.
pub(crate) fn is_operations(value: &Value) -> bool {
    let is_operation = |each: &Value| each.get("op").is_some() && each.get("path").is_some();
    value.as_array().is_some_and(|all| all.iter().all(is_operation)) && touches(value)
}

fn refused(place: &Place, op: &str, path: &str, instead: &'static str) -> PatchError {
    let operation = Operation { op: op.to_owned(), path: path.to_owned(), instead };
    PatchError::Operation(place.clone(), Box::new(operation))
}

fn is_sharing(pointer: &str) -> bool {
    ["/spec/multiClusterTargetGroup", "/spec/targetGroup/sharing"].contains(&pointer)
}

/// Converts a JSON 6902 operation.
fn operation(place: &Place, mut operation: Value, to: Version) -> Result<Value, PatchError> {
    let text = |key: &str| operation.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (op, path, from) = (text("op"), text("path"), text("from"));
    if path == "/spec" {
        return Err(refused(place, &op, &path, "write a strategic merge patch"));
    }
    let new_path = moved(place, &op, &path, to)?;
    let new_from = moved(place, &op, &from, to)?;
    if (is_sharing(&path) != is_sharing(&from))
        && (is_sharing(&path) || is_sharing(&from))
        && !from.is_empty()
    {
        let instead = "its value is a boolean in one version and a word in the other";
        return Err(refused(place, &op, &path, instead));
    }
    let role = new_path.contains("/assumeRole/") && to == Version::V1 && new_path != path;
    if role && ["add", "remove", "move", "copy"].contains(&op.as_str()) {
        let instead = "add or remove /spec/targetGroup/assumeRole, an object of roleARN and externalID";
        return Err(refused(place, &op, &path, instead));
    }
    if let Value::Object(members) = &mut operation {
        if is_sharing(&path)
            && path != new_path
            && let Some(value) = members.get_mut("value")
        {
            let new = if to == Version::V1 { sharing(value.take()) } else { multi_cluster(value.take()) };
            *value = new;
        }
        for (key, new) in [("path", new_path), ("from", new_from)] {
            if members.contains_key(key) {
                members.insert(key.to_owned(), new.into());
            }
        }
    }
    Ok(operation)
}

/// A JSON pointer as another version has it; the same if nothing moves.
fn moved(place: &Place, op: &str, pointer: &str, to: Version) -> Result<String, PatchError> {
    let Some(rest) = pointer.strip_prefix("/spec/") else { return Ok(pointer.to_owned()) };
    for (old, path) in MOVED {
        let new = path.replace('.', "/");
        let (is, becomes) = if to == Version::V1 { (old, new.as_str()) } else { (new.as_str(), old) };
        if rest == is {
            return Ok(format!("/spec/{becomes}"));
        }
    }
    let whole = ["targetGroup", "targetGroup/assumeRole"].contains(&rest);
    if to != Version::V1 && whole {
        return Err(refused(place, op, pointer, "name each of its fields"));
    }
    Ok(pointer.to_owned())
}
