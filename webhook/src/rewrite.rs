//! `tgb-webhook convert`: rewrites manifests on disk to another version.
//!
//! - [`main`]: the command. Kustomize patches of bindings are converted with them ([`kustomize`]).
//! - [`documents`], [`Document::parse`], [`Node`]: YAML (and JSON, which is YAML) with the lines of its fields; `lint`
//!   reads with them too.
//!
//! The text is split at its document markers, and only documents that hold a binding of another version are written anew.

use crate::kustomize::{self, Ours, PatchFile};
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::ser::{Serialize, SerializeMap as _, SerializeSeq as _, Serializer};
use serde_json::{Number, Value};
use serde_saphyr::granit_parser::{Event, Parser};
use serde_saphyr::{MessageFormatter as _, Spanned, UserMessageFormatter};
use std::collections::BTreeMap;
use std::fmt;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tgb_api::convert::{MOVED, convert, convert_patch};
use tgb_api::crd::Version;
use tgb_api::names;

/// The most bytes of one file; manifests are far smaller, and a mistaken argument should not fill the memory.
pub(crate) const MOST_BYTES: u64 = 8 << 20;

/// Up to here every whole number is a float, and nothing between them (2^53).
const WHOLE: f64 = 9_007_199_254_740_992.0;

/// What `convert` is told.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The version that bindings are rewritten to.
    #[arg(long, env = "TGB_TO", value_enum)]
    to: To,
    /// Write the files; without it, what would change is shown as a diff.
    #[arg(long, env = "TGB_IN_PLACE")]
    in_place: bool,
    /// Manifests: YAML or JSON, several documents each; kustomizations and the files of their patches.
    #[arg(required = true)]
    files: Vec<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum To {
    V1,
    V1beta1,
}

/// Why input can't be used: the line, counted from 1, where one is known, and what is wrong there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unusable {
    pub(crate) line: Option<u64>,
    pub(crate) message: String,
}

impl Unusable {
    fn whole(message: impl Into<String>) -> Self {
        Self { line: None, message: message.into() }
    }

    /// `FILE:LINE: MESSAGE`, on one line.
    pub(crate) fn of(&self, file: &str) -> String {
        let message = self.message.lines().next().unwrap_or_default();
        match self.line {
            Some(line) => format!("{file}:{line}: {message}"),
            None => format!("{file}: {message}"),
        }
    }
}

/// Runs the command. All files are read and converted before the first one is written.
pub(crate) fn main(options: &Options) -> ExitCode {
    let to = match options.to {
        To::V1 => Version::V1,
        To::V1beta1 => Version::V1Beta1,
    };
    let (mut texts, mut unusable) = (Vec::new(), Vec::new());
    for file in &options.files {
        let name = file.display().to_string();
        match read_file(file) {
            Ok(text) => texts.push((file, name, text)),
            Err(problem) => unusable.push(problem.of(&name)),
        }
    }
    let used: Vec<Used> = texts.iter().flat_map(|(file, name, text)| used(file, name, text, to)).collect();
    let patches = |path: &Path| {
        let path = path.canonicalize().ok()?;
        used.iter().filter(|used| used.path == path).map(|used| used.ours).max()
    };
    let mut all = Vec::new();
    for (file, name, text) in &texts {
        match rewrite(text, to, patches(file)) {
            Ok(rewritten) => all.push((file, name, rewritten, text)),
            Err(problem) => unusable.push(problem.of(name)),
        }
    }
    unusable.extend(left_out(&used, &options.files, to));
    unusable.iter().for_each(|problem| eprintln!("error: {problem}"));
    if !unusable.is_empty() {
        eprintln!("error: nothing was written");
        return ExitCode::from(2);
    }
    let mut diff = String::new();
    for (file, name, rewritten, text) in &all {
        for remark in &rewritten.remarks {
            eprintln!("{name}:{remark}");
        }
        if rewritten.text == **text {
            continue;
        }
        for refusal in crate::lint::refusals(&rewritten.text) {
            eprintln!("{name}: warning: {} refuses this in a new object: {refusal}", to.name());
        }
        if !options.in_place {
            let changes = similar::TextDiff::from_lines(text.as_str(), rewritten.text.as_str());
            diff.push_str(&changes.unified_diff().header(name, name).to_string());
        } else if let Err(error) = replace(file, &rewritten.text) {
            eprintln!("error: {name}: can't be written: {error}");
            return ExitCode::FAILURE;
        } else {
            eprintln!("{name}: converted {} to {}", rewritten.converted, to.api_version());
        }
    }
    crate::print(&diff)
}

/// A file that a document uses as a patch.
#[derive(Debug)]
struct Used {
    /// Canonical, if it is there.
    path: PathBuf,
    /// The name in the document.
    file: PatchFile,
    /// The document's file.
    by: String,
    ours: Ours,
}

/// The files that a text's documents use as patches.
fn used(file: &Path, name: &str, text: &str, to: Version) -> Vec<Used> {
    let folder = file.parent().unwrap_or(Path::new(""));
    let parsed =
        documents(text).into_iter().filter(|document| mentions(document.text)).filter_map(|document| {
            let mut value = document.parse().ok()??.value.value();
            // What can't be converted is told when the file itself is.
            kustomize::convert(&mut value, to).ok().map(|(_, files)| files)
        });
    let of = |file: PatchFile| {
        let path = folder.join(&file.path);
        Used { path: path.canonicalize().unwrap_or(path), ours: file.ours, by: name.to_owned(), file }
    };
    parsed.flatten().map(of).collect()
}

/// Files that are used as patches of bindings and would have to change, but are not to be converted.
fn left_out(used: &[Used], given: &[PathBuf], to: Version) -> Vec<String> {
    let given: Vec<PathBuf> = given.iter().filter_map(|path| path.canonicalize().ok()).collect();
    let mut problems = BTreeMap::new();
    for each in used.iter().filter(|used| !given.contains(&used.path)) {
        let Used { file: PatchFile { path, .. }, by, .. } = each;
        let problem = match read_file(&each.path) {
            Err(problem) if each.ours == Ours::Yes => {
                format!("{by} patches a binding with {}", problem.of(path))
            }
            Err(_) => continue,
            Ok(text) => match rewrite(&text, to, Some(each.ours)) {
                Ok(rewritten) if rewritten.text == text => continue,
                _ => format!(
                    "{by} patches a binding with {path}, which has to be converted as well: name it, too"
                ),
            },
        };
        problems.insert(&each.path, problem);
    }
    problems.into_values().collect()
}

/// Reads a file as text.
pub(crate) fn read_file(path: &Path) -> Result<String, Unusable> {
    let unreadable = |error: std::io::Error| Unusable::whole(format!("can't be read: {error}"));
    let file = std::fs::File::open(path).map_err(unreadable)?;
    if file.metadata().is_ok_and(|about| about.is_dir()) {
        return Err(Unusable::whole("is a directory"));
    }
    read_text(file)
}

/// Reads text of a sensible size.
pub(crate) fn read_text(from: impl std::io::Read) -> Result<String, Unusable> {
    let mut bytes = Vec::new();
    from.take(MOST_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| Unusable::whole(format!("can't be read: {error}")))?;
    if u64::try_from(bytes.len()).is_ok_and(|size| size > MOST_BYTES) {
        return Err(Unusable::whole(format!("is larger than {} MiB", MOST_BYTES >> 20)));
    }
    String::from_utf8(bytes).map_err(|error| {
        let good = error.utf8_error().valid_up_to();
        let lines = error.as_bytes().iter().take(good).filter(|byte| **byte == b'\n').count();
        Unusable { line: u64::try_from(lines + 1).ok(), message: "is not UTF-8".to_owned() }
    })
}

// ---- documents ----

/// One document of a text, its marker included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Document<'a> {
    /// The text, from the marker to the next one.
    pub(crate) text: &'a str,
    /// The line of the text's start, counted from 1.
    pub(crate) line: u64,
}

fn is_marker(line: &str) -> bool {
    line.strip_prefix("---").is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace))
}

fn is_blank_or_comment(line: &str) -> bool {
    let text = line.trim_start_matches('\u{feff}').trim();
    text.is_empty() || text.starts_with('#')
}

/// The documents of a text; together they are the text. A line that begins with `---` begins a document wherever it
/// stands (YAML 1.2, 9.1.2); directives, at the start or behind `...`, belong to the document behind their marker.
pub(crate) fn documents(text: &str) -> Vec<Document<'_>> {
    let mut all = Vec::new();
    let (mut start, mut first, mut at) = (0, 1, 0);
    let (mut open, mut directives) = (false, false);
    for (number, line) in (1..).zip(text.split_inclusive('\n')) {
        let marker = is_marker(line);
        let directive = !open && line.starts_with('%');
        if (marker || directive) && at > start && !directives {
            all.extend(text.get(start..at).map(|text| Document { text, line: first }));
            (start, first) = (at, number);
        }
        if line.trim_end() == "..." {
            (open, directives) = (false, false);
        } else if directive {
            directives = true;
        } else if marker || !is_blank_or_comment(line) {
            (open, directives) = (true, false);
        }
        at += line.len();
    }
    all.extend(text.get(start..).filter(|rest| !rest.is_empty()).map(|text| Document { text, line: first }));
    all
}

impl Document<'_> {
    /// The value; nothing if there are only comments.
    pub(crate) fn parse(&self) -> Result<Option<Spanned<Node>>, Unusable> {
        if self.text.lines().all(|line| is_blank_or_comment(line) || line.trim_end() == "---") {
            return Ok(None);
        }
        let text = self.text.trim_start_matches('\u{feff}');
        let parsed: Spanned<Node> = serde_saphyr::from_str(text).map_err(|error| {
            let error = error.without_snippet();
            Unusable {
                line: Some(error.location().map_or(self.line, |at| self.line_of(at.line()))),
                message: format!("is no YAML: {}", UserMessageFormatter.format_message(error)),
            }
        })?;
        Ok(Some(parsed).filter(|parsed| !matches!(parsed.value, Node::Scalar(Value::Null))))
    }

    /// A line of the document as a line of the text.
    pub(crate) fn line_of(&self, line: u64) -> u64 {
        self.line + line.saturating_sub(1)
    }
}

/// A YAML value whose parts know where they are.
#[derive(Debug, Clone)]
pub(crate) enum Node {
    Scalar(Value),
    Sequence(Vec<Spanned<Node>>),
    Mapping(Vec<(String, Spanned<Node>)>),
}

impl Node {
    /// The value without places.
    pub(crate) fn value(&self) -> Value {
        match self {
            Self::Scalar(value) => value.clone(),
            Self::Sequence(items) => items.iter().map(|item| item.value.value()).collect(),
            Self::Mapping(members) => Value::Object(
                members.iter().map(|(key, member)| (key.clone(), member.value.value())).collect(),
            ),
        }
    }

    /// A member of a mapping.
    pub(crate) fn member(&self, key: &str) -> Option<&Spanned<Node>> {
        match self {
            Self::Mapping(members) => members.iter().find(|(name, _)| name == key).map(|(_, member)| member),
            _ => None,
        }
    }

    /// An item of a sequence.
    pub(crate) fn item(&self, index: usize) -> Option<&Spanned<Node>> {
        match self {
            Self::Sequence(items) => items.get(index),
            _ => None,
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Node;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }
            fn visit_unit<E>(self) -> Result<Node, E> {
                Ok(Node::Scalar(Value::Null))
            }
            fn visit_none<E>(self) -> Result<Node, E> {
                Ok(Node::Scalar(Value::Null))
            }
            fn visit_some<D: Deserializer<'de>>(self, inner: D) -> Result<Node, D::Error> {
                Node::deserialize(inner)
            }
            fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
                Ok(Node::Scalar(Value::Bool(value)))
            }
            fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
                Ok(Node::Scalar(value.into()))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
                Ok(Node::Scalar(value.into()))
            }
            fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Node, E> {
                // Of what stands for a whole number kubectl makes one: 80.0 is the port 80.
                let whole =
                    (value.fract() == 0.0 && value.abs() < WHOLE).then(|| format!("{value:.0}").parse());
                if let Some(Ok(whole)) = whole {
                    return self.visit_i64(whole);
                }
                let number = Number::from_f64(value).ok_or_else(|| E::custom("JSON has no such number"))?;
                Ok(Node::Scalar(Value::Number(number)))
            }
            fn visit_str<E>(self, value: &str) -> Result<Node, E> {
                Ok(Node::Scalar(value.into()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Node, A::Error> {
                let mut all = Vec::new();
                while let Some(item) = items.next_element()? {
                    all.push(item);
                }
                Ok(Node::Sequence(all))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Node, A::Error> {
                let mut all = Vec::new();
                while let Some(member) = members.next_entry()? {
                    all.push(member);
                }
                Ok(Node::Mapping(all))
            }
        }
        deserializer.deserialize_any(Reader)
    }
}

// ---- rewriting ----

#[derive(Debug)]
struct Rewritten {
    text: String,
    /// How many bindings were converted.
    converted: usize,
    /// For the user: `LINE: …`.
    remarks: Vec<String>,
}

/// True if a document may hold a binding, or a patch of one. What does not is not even parsed: it may be a template.
fn mentions(text: &str) -> bool {
    let other = [names::GROUP, names::KIND, "patches", "replacements"];
    other.into_iter().chain(MOVED.iter().map(|(old, _)| *old)).any(|word| text.contains(word))
}

/// Rewrites a text; `patch` says whether it is the file of a patch, and for what.
fn rewrite(text: &str, to: Version, patch: Option<Ours>) -> Result<Rewritten, Unusable> {
    let mut out = Rewritten { text: String::with_capacity(text.len()), converted: 0, remarks: Vec::new() };
    for document in documents(text) {
        let node = match document.parse() {
            _ if patch.is_none() && !mentions(document.text) => None,
            Err(_) if patch.is_none() && !document.text.contains(names::GROUP) => None,
            parsed => parsed?,
        };
        let Some(node) = node else {
            out.text.push_str(document.text);
            continue;
        };
        let line = document.line_of(node.referenced.line());
        let unusable = |message: String| Unusable { line: Some(line), message };
        let mut new = node.value.value();
        let count = convert_document(&mut new, to, patch).map_err(unusable)?;
        if count == 0 {
            let other = Version::ALL.into_iter().filter(|version| *version != to);
            let other = other.map(Version::api_version).find(|version| {
                let ends = |rest: &str| !rest.starts_with(|next: char| next.is_ascii_alphanumeric());
                document
                    .text
                    .match_indices(version)
                    .any(|(at, _)| document.text.get(at + version.len()..).is_some_and(ends))
            });
            if let Some(version) = other {
                let what = "and is neither a binding, nor a list of them, nor a patch";
                out.remarks.push(format!("{line}: skipped: mentions {version}, {what}"));
            }
            out.text.push_str(document.text);
            continue;
        }
        let (text, lost) = write(document, &new, to).map_err(unusable)?;
        if lost > 0 {
            out.remarks.push(format!("{line}: warning: comments inside this document are lost ({lost})"));
        }
        out.text.push_str(&text);
        out.converted += count;
    }
    Ok(out)
}

/// Converts what a document holds; says how much changed.
fn convert_document(value: &mut Value, to: Version, patch: Option<Ours>) -> Result<usize, String> {
    if let Some(ours) = patch {
        let place = kustomize::in_file("this file");
        let new =
            kustomize::convert_patch(&place, value.clone(), ours, to).map_err(|error| error.to_string())?;
        let changed = new != *value;
        *value = new;
        return Ok(usize::from(changed));
    }
    if kustomize::is_operations(value) {
        let what = "is a JSON patch of fields that move; name the kustomization that uses it, too";
        return Err(what.to_owned());
    }
    match convert_within(value, to)? {
        0 if !is_binding(value) => {
            let (count, _) = kustomize::convert(value, to).map_err(|error| error.to_string())?;
            Ok(count)
        }
        count => Ok(count),
    }
}

/// A text whose documents `edit` changes, which says whether it did. Others stay byte for byte.
///
/// # Errors
/// Those of `edit`, and of `unreadable`, which gets a sentence.
pub(crate) fn edited<E>(
    text: &str,
    to: Version,
    mut edit: impl FnMut(&mut Value) -> Result<bool, E>,
    unreadable: impl Fn(String) -> E,
) -> Result<String, E> {
    let mut out = String::with_capacity(text.len());
    for document in documents(text) {
        let node = document.parse().map_err(|problem| unreadable(problem.message))?;
        let Some(mut value) = node.map(|node| node.value.value()) else {
            out.push_str(document.text);
            continue;
        };
        if edit(&mut value)? {
            out.push_str(&write(document, &value, to).map_err(&unreadable)?.0);
        } else {
            out.push_str(document.text);
        }
    }
    Ok(out)
}

/// A document with another value, and how many comments got lost: with the words of one version replaced by those of the
/// other, if that is enough, or written anew.
fn write(document: Document<'_>, value: &Value, to: Version) -> Result<(String, usize), String> {
    let text = with_words(document.text, to);
    let again = Document { text: &text, line: 1 }.parse();
    if again.is_ok_and(|node| node.is_some_and(|node| node.value.value() == *value)) {
        return Ok((text, 0));
    }
    render(document, value)
}

/// A text with the paths and versions of one version in place of the others'.
fn with_words(text: &str, to: Version) -> String {
    let mut words = Vec::new();
    for (old, new) in MOVED {
        for (before, between) in [("/spec/", "/"), ("spec.", ".")] {
            let pair = (format!("{before}{old}"), format!("{before}{}", new.replace('.', between)));
            words.push(if to == Version::V1 { pair } else { (pair.1, pair.0) });
        }
    }
    for from in Version::ALL.into_iter().filter(|from| *from != to) {
        words.push((from.api_version().to_owned(), to.api_version().to_owned()));
        for before in ["version: ", "version: \"", "version: '", "\"version\": \""] {
            words.push((format!("{before}{}", from.name()), format!("{before}{}", to.name())));
        }
    }
    words.iter().fold(text.to_owned(), |text, (from, to)| {
        let mut out = String::with_capacity(text.len());
        let mut rest = text.as_str();
        while let Some((before, after)) = rest.split_once(from.as_str()) {
            let is_whole = !after.starts_with(|next: char| next.is_ascii_alphanumeric());
            out.push_str(before);
            out.push_str(if is_whole { to } else { from });
            rest = after;
        }
        out + rest
    })
}

/// Whether a value is a binding of any version, known or not.
pub(crate) fn is_binding(value: &Value) -> bool {
    let text = |key| value.get(key).and_then(Value::as_str).unwrap_or_default();
    text("kind") == names::KIND
        && text("apiVersion").split_once('/').is_some_and(|(group, _)| group == names::GROUP)
}

/// Converts a binding, or those of a list; says how many changed.
fn convert_within(value: &mut Value, to: Version) -> Result<usize, String> {
    let text =
        |value: &Value, key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    if is_binding(value) {
        if text(value, "apiVersion") == to.api_version() {
            return Ok(0);
        }
        // A null stays: to an object it is as good as absent, and this may be a patch.
        let new = convert_patch(value.clone(), to).or_else(|_| convert(value.take(), to));
        *value = new.map_err(|error| error.to_string())?;
        return Ok(1);
    }
    if !text(value, "kind").ends_with("List") {
        return Ok(0);
    }
    let typed = text(value, "kind") == format!("{}List", names::KIND);
    let from = text(value, "apiVersion");
    let mut count = 0;
    for item in value.get_mut("items").and_then(Value::as_array_mut).into_iter().flatten() {
        if typed && let Value::Object(item) = item {
            item.entry("apiVersion").or_insert_with(|| from.clone().into());
            item.entry("kind").or_insert_with(|| names::KIND.into());
        }
        count += convert_within(item, to)?;
    }
    if typed
        && count > 0
        && let Value::Object(list) = value
    {
        list.insert("apiVersion".into(), to.api_version().into());
    }
    Ok(count)
}

/// A document with another value, and how many comments got lost. What stands before and behind the value stays.
fn render(document: Document<'_>, value: &Value) -> Result<(String, usize), String> {
    let is_head = |line: &&str| is_blank_or_comment(line) || line.starts_with('%');
    let is_tail = |line: &&str| line.trim().is_empty() || line.starts_with('#') || line.trim_end() == "...";
    let mut head = 0;
    let mut marked = false;
    for line in document.text.split_inclusive('\n') {
        let bare = is_marker(line) && line.get(3..).is_some_and(is_blank_or_comment);
        if !(is_head(&line) || (bare && !marked)) {
            break;
        }
        marked |= bare;
        head += line.len();
    }
    let (head, rest) = document.text.split_at_checked(head).ok_or("can't be split")?;
    let tail: usize = rest.split_inclusive('\n').rev().take_while(is_tail).map(str::len).sum();
    let (core, tail) = rest.split_at_checked(rest.len().saturating_sub(tail)).ok_or("can't be split")?;
    let marker = if is_marker(core) { "---\n" } else { "" };

    let body = if core.trim_start().starts_with('{') {
        format!("{:#}\n", Value::clone(value))
    } else {
        let options = serde_saphyr::ser_options! {
            compact_list_indent: true,
            min_fold_chars: usize::MAX,
            folded_wrap_chars: usize::MAX,
        };
        serde_saphyr::to_string_with_options(&Ordered(value), options).map_err(|error| error.to_string())?
    };
    let mut body = format!("{marker}{body}");
    if !core.ends_with('\n') && tail.is_empty() {
        body.truncate(body.trim_end_matches('\n').len());
    }
    if document.text.contains("\r\n") {
        body = body.replace('\n', "\r\n");
    }
    let lost = comments(core);
    for text in [format!("{head}{body}{tail}"), format!("{head}{body}")] {
        let again = Document { text: &text, line: 1 }.parse();
        if again.is_ok_and(|node| node.is_some_and(|node| node.value.value() == *value)) {
            return Ok((text, lost));
        }
    }
    Err("can't be written as YAML that means the same".to_owned())
}

fn comments(text: &str) -> usize {
    let mut options = serde_saphyr::granit_parser::Options::default();
    options.emit_comments = true;
    Parser::new_from_str_with_options(text, options)
        .filter(|event| matches!(event, Ok((Event::Comment(..), _))))
        .count()
}

/// A value whose mappings begin with the members that people look for first.
struct Ordered<'a>(&'a Value);

impl Serialize for Ordered<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        const FIRST: [&str; 13] = [
            "apiVersion",
            "kind",
            "metadata",
            "spec",
            "status",
            "name",
            "namespace",
            "targetGroup",
            "targetGroupARN",
            "targetGroupName",
            "arn",
            "targetType",
            "serviceRef",
        ];
        match self.0 {
            Value::Object(members) => {
                let mut members: Vec<_> = members.iter().collect();
                members.sort_by_key(|(key, _)| {
                    FIRST.iter().position(|first| first == key).unwrap_or(FIRST.len())
                });
                let mut map = serializer.serialize_map(Some(members.len()))?;
                for (key, member) in members {
                    map.serialize_entry(key, &Ordered(member))?;
                }
                map.end()
            }
            Value::Array(items) => {
                let mut list = serializer.serialize_seq(Some(items.len()))?;
                for item in items {
                    list.serialize_element(&Ordered(item))?;
                }
                list.end()
            }
            scalar => scalar.serialize(serializer),
        }
    }
}

/// Puts a text in a file's place at once; links are followed, permissions kept.
fn replace(path: &Path, text: &str) -> std::io::Result<()> {
    let path = path.canonicalize()?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let beside = path.with_file_name(format!(".{name}.{}.tmp", std::process::id()));
    let written = (|| {
        let mut file = std::fs::File::options().write(true).create_new(true).open(&beside)?;
        file.set_permissions(std::fs::metadata(&path)?.permissions())?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&beside, &path)
    })();
    if written.is_err() {
        drop(std::fs::remove_file(&beside));
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    const BETA: &str = "apiVersion: elbv2.k8s.aws/v1beta1\nkind: TargetGroupBinding\nmetadata: {name: web}\nspec:\n  \
        targetGroupName: web\n  serviceRef: {name: web, port: http}\n";

    fn to_v1(text: &str) -> Rewritten {
        rewrite(text, Version::V1, None).unwrap()
    }

    #[test]
    fn documents_that_need_no_change_stay_byte_for_byte() {
        let other = "# why\r\n---   # first\nkind:   Service   # odd spacing\n\n\n---\n# nothing\n---\n{{ template }}\n---\n{\"kind\": \"X\"}";
        assert_eq!(to_v1(other).text, other);
        let mixed = to_v1(&format!("{other}\n---\n{BETA}"));
        assert!(mixed.text.starts_with(other), "{}", mixed.text);
        assert_eq!(mixed.converted, 1);
    }

    #[test]
    fn directives_belong_to_the_document_behind_them() {
        let text = "# a\n%YAML 1.2\n---\na: |\n  %b\n--- {c: d}\n...\n# e\n%YAML 1.2\n---\nf: 1\n";
        let lines: Vec<u64> = documents(text).iter().map(|document| document.line).collect();
        assert_eq!(lines, [1, 2, 6, 9]);
        assert_eq!(documents(text).iter().map(|document| document.text).collect::<String>(), text);
        assert!(documents(text).iter().all(|document| document.parse().is_ok()));
    }

    #[test]
    fn a_binding_is_rewritten_with_its_parts_in_the_usual_order() {
        let text = to_v1(BETA).text;
        let keys: Vec<&str> =
            text.lines().filter(|l| !l.starts_with([' ', '-'])).filter_map(|l| l.split(':').next()).collect();
        assert_eq!(keys, ["apiVersion", "kind", "metadata", "spec"]);
        let value = documents(&text)[0].parse().unwrap().unwrap().value.value();
        assert_eq!(value["spec"]["targetGroup"]["name"], "web");
        assert_eq!(to_v1(&text).text, text);
    }

    #[test]
    fn texts_that_look_like_other_values_stay_texts() {
        let beta = BETA.replace(
            "{name: web}",
            "{name: web, annotations: {a: 'yes', b: '0123', c: \"1e3\", d: \"x # y\"}}",
        );
        let text = to_v1(&beta).text;
        let value = documents(&text)[0].parse().unwrap().unwrap().value.value();
        assert_eq!(
            value["metadata"]["annotations"],
            serde_json::json!({"a": "yes", "b": "0123", "c": "1e3", "d": "x # y"})
        );
        assert!(!text.contains("a: yes"), "YAML 1.1 reads that as a boolean: {text}");
    }

    #[test]
    fn lost_comments_are_counted_and_those_around_the_document_stay() {
        let done =
            to_v1(&format!("# licence\n---\n# about\n{BETA}  # inside\n  networking: {{}}\n# behind\n"));
        assert!(
            done.text.starts_with("# licence\n---\n# about\napiVersion: elbv2.k8s.aws/v1\n"),
            "{}",
            done.text
        );
        assert!(done.text.ends_with("# behind\n"));
        assert_eq!(done.remarks, ["4: warning: comments inside this document are lost (1)"]);
        assert!(to_v1(BETA).remarks.is_empty());
    }

    #[test]
    fn the_bindings_of_a_list_are_converted_and_other_items_kept() {
        let list = format!(
            "apiVersion: v1\nkind: List\nitems:\n- kind: Service\n  apiVersion: v1\n- {}\n",
            BETA.trim_end().replace('\n', "\n  ")
        );
        let done = to_v1(&list);
        let value = documents(&done.text)[0].parse().unwrap().unwrap().value.value();
        assert_eq!(done.converted, 1);
        assert_eq!(value["items"][0]["kind"], "Service");
        assert_eq!(value["items"][1]["apiVersion"], "elbv2.k8s.aws/v1");
    }

    #[test]
    fn what_is_no_yaml_is_told_with_its_line_in_the_file() {
        let problem =
            rewrite(&format!("{BETA}---\na: elbv2.k8s.aws\nc: [\n---\n"), Version::V1, None).unwrap_err();
        assert!(problem.line.is_some_and(|line| (8..=10).contains(&line)), "{problem:?}");
        assert_eq!(read_text(&b"a: b\nc: \xff\n"[..]).unwrap_err().of("x"), "x:2: is not UTF-8");
    }

    #[test]
    fn an_unknown_version_is_unusable_and_not_guessed() {
        let problem = rewrite(&BETA.replace("v1beta1", "v7"), Version::V1, None).unwrap_err();
        assert!(problem.of("x").contains("v7"), "{problem:?}");
    }

    #[test]
    fn patches_of_a_kustomization_are_converted_and_the_rest_of_it_stays() {
        let text = "namespace: shop # why\nresources: [../base]\npatches:\n- target: {group: elbv2.k8s.aws, version: v1beta1, kind: TargetGroupBinding, name: web}\n  \
            patch: |-\n    # prod\n    - op: replace\n      path: /spec/targetGroupARN\n      value: arn:x\n\
            - target: {version: v1beta1, kind: CronJob}\n  patch: '[]'\n";
        let done = to_v1(text);
        let wanted = text
            .replace("version: v1beta1, kind: Target", "version: v1, kind: Target")
            .replace("/spec/targetGroupARN", "/spec/targetGroup/arn");
        let value = |text: &str| documents(text)[0].parse().unwrap().unwrap().value.value();
        assert_eq!(value(&done.text), value(&wanted));
        assert_eq!(done.converted, 1);
        // Without the other target the words are all that changes, so comments stay.
        let text = text.split("- target: {version").next().unwrap();
        assert_eq!(to_v1(text).text, wanted.split("- target: {version").next().unwrap());
    }

    #[test]
    fn strategic_merge_patches_are_converted_inline_and_keep_their_nulls() {
        let patch = format!("{BETA}  vpcID: null\n  multiClusterTargetGroup: true\n");
        let text = format!("patchesStrategicMerge:\n- |\n  {}\n", patch.trim_end().replace('\n', "\n  "));
        let done = to_v1(&text);
        let value = documents(&done.text)[0].parse().unwrap().unwrap().value.value();
        let inner =
            documents(value["patchesStrategicMerge"][0].as_str().unwrap())[0].parse().unwrap().unwrap();
        let spec = &inner.value.value()["spec"];
        assert_eq!(
            spec["targetGroup"],
            serde_json::json!({"name": "web", "vpcID": null, "sharing": "Shared"})
        );
        // With a target, the patch itself need not say what it is.
        let text = "patches:\n- target: {kind: TargetGroupBinding}\n  patch: '{\"kind\": \"x\", \"spec\": {\"targetType\": \"ip\"}}'\n";
        let done = to_v1(text);
        assert!(done.text.contains("targetGroup") && !done.text.contains("v1beta1"), "{}", done.text);
    }

    #[test]
    fn replacements_of_fields_that_move_are_converted() {
        let text = "replacements:\n- source: {kind: ConfigMap, name: a, fieldPath: data.arn}\n  targets:\n  - select: {kind: TargetGroupBinding, version: v1beta1}\n    \
            fieldPaths: [spec.targetGroupARN, metadata.name]\n";
        let wanted = text.replace("spec.targetGroupARN", "spec.targetGroup.arn").replace("v1beta1", "v1");
        assert_eq!(to_v1(text).text, wanted);
        let back = rewrite(&wanted, Version::V1Beta1, None).unwrap();
        assert_eq!(back.text, text);
    }

    #[test]
    fn a_patch_that_cannot_be_converted_is_refused_by_name() {
        let refused = |text: &str| rewrite(text, Version::V1, None).unwrap_err().of("k.yaml");
        let patch =
            |target: &str, op: &str| format!("patches:\n- target: {{{target}}}\n  patch: '[{{{op}}}]'\n");
        let op = r#""op": "replace", "path": "/spec/targetGroupARN", "value": "x""#;
        for (text, part) in [
            (patch("name: web", op), "patches[0] patches fields that move"),
            (patch("kind: Target.*", op), "patches[0] patches fields that move"),
            (patch("kind: TargetGroupBinding, version: v1b.*", op), "\"v1b.*\"; write v1"),
            (
                patch(
                    "kind: TargetGroupBinding",
                    r#""op": "add", "path": "/spec/iamRoleArnToAssume", "value": "x""#,
                ),
                "add of /spec/iamRoleArnToAssume",
            ),
            (
                patch(
                    "kind: TargetGroupBinding",
                    r#""op": "copy", "from": "/spec/multiClusterTargetGroup", "path": "/metadata/annotations/a""#,
                ),
                "a boolean in one version",
            ),
            (format!("[{{{op}}}]"), "name the kustomization"),
            (
                "vars:\n- objref: {kind: TargetGroupBinding}\n  fieldref: {fieldpath: spec.targetGroupARN}\n"
                    .to_owned(),
                "vars[0]",
            ),
        ] {
            let said = refused(&text);
            assert!(said.contains(part), "{said}");
        }
    }

    #[test]
    fn a_patch_in_a_file_is_converted_with_its_kustomization_and_missed_without() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let k = write(
            "kustomization.yaml",
            "patches:\n- target: {kind: TargetGroupBinding}\n  path: p.json\n- path: q.yaml\n",
        );
        let p = write("p.json", r#"[{"op": "replace", "path": "/spec/targetType", "value": "ip"}]"#);
        let q = write("q.yaml", BETA);
        let text = std::fs::read_to_string(&k).unwrap();
        let used = used(&k, "k", &text, Version::V1);
        assert_eq!(used.iter().map(|used| used.ours).collect::<Vec<_>>(), [Ours::Yes, Ours::Perhaps]);
        let left = left_out(&used, &[k.clone(), q], Version::V1);
        assert_eq!(left.len(), 1);
        assert!(left[0].contains("k patches a binding with p.json"), "{left:?}");
        let done = rewrite(&std::fs::read_to_string(&p).unwrap(), Version::V1, Some(Ours::Yes)).unwrap();
        assert!(done.text.contains("/spec/targetGroup/targetType"), "{}", done.text);
        assert_eq!(left_out(&used, &[k, p, dir.path().join("q.yaml")], Version::V1), [""; 0]);
    }

    #[test]
    fn a_version_that_is_mentioned_elsewhere_is_told_and_left() {
        let text =
            format!("kind: ConfigMap\ndata:\n  a: |\n    {}\n", BETA.trim_end().replace('\n', "\n    "));
        let done = to_v1(&text);
        assert_eq!(done.text, text);
        assert!(done.remarks[0].contains("skipped: mentions elbv2.k8s.aws/v1beta1"), "{:?}", done.remarks);
    }

    #[test]
    fn a_file_is_replaced_whole_with_its_permissions() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.yaml");
        std::fs::write(&path, "old").unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
        replace(&path, "new").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn manifests_of_every_release_line_of_lbc_mean_in_v1_what_stands_beside_them_and_go_back() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../e2e/lbc/manifests");
        let values = |path: &Path| -> Vec<Value> {
            let text = read_file(path).unwrap();
            documents(&text).iter().map(|each| each.parse().unwrap().unwrap().value.value()).collect()
        };
        let mut releases: Vec<PathBuf> =
            std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
        releases.retain(|path| !path.to_string_lossy().ends_with(".v1.yaml"));
        assert!(releases.len() >= 9, "{releases:?}");
        for path in releases {
            let (old, new) = (values(&path), values(&path.with_extension("v1.yaml")));
            assert_eq!(old.len(), new.len(), "{}", path.display());
            for (old, new) in old.into_iter().zip(new) {
                let to = |object: &Value, version| convert(object.clone(), version).unwrap();
                let version = old.get("apiVersion").and_then(Value::as_str).and_then(Version::of_api_version);
                assert_eq!(to(&old, Version::V1), new);
                assert_eq!(to(&new, version.unwrap()), old);
            }
        }
    }
}
