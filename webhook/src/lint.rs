//! `tgb-webhook lint`: the rules of admission on files, without a cluster and without AWS unless it is told to ask them.
//!
//! What is checked of each binding: the schema of its own version (from the CustomResourceDefinition), then every rule on
//! its v1 form. Services and other bindings of the same input take part, and of the cluster with `--cluster`. Findings
//! name the file's line and the path in the version that the file speaks.

use crate::kustomize;
use crate::rewrite::{Document, Node, Unusable, documents, is_binding, read_file, read_text};
use crate::surroundings::{self, Answers, Described, Question, Stored, question};
use clap::ValueEnum;
use serde_json::{Map, Value, json};
use serde_saphyr::Spanned;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tgb_api::crd::{Version, crd};
use tgb_api::rules::{Context, Lookup, Operation, Other, Settings, Severity, check, path_in};
use tgb_api::schema::{self, Fault};
use tgb_api::service::Service;
use tgb_api::target_group::TargetGroup;
use tgb_api::text::{excerpt, quoted};
use tgb_api::v1::TargetGroupBinding;
use tgb_api::{convert, defaulting, names, objects, rules};

/// What `lint` is told.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How findings are written.
    #[arg(long, env = "TGB_OUTPUT", value_enum, default_value_t = Output::Text)]
    output: Output,
    /// From which severity on findings make the exit code 1.
    #[arg(long, env = "TGB_FAIL_ON", value_enum, default_value_t = FailOn::Error)]
    fail_on: FailOn,
    /// Severities that differ from docs/rules.md, as in TGB206=warn,TGB306=off.
    #[arg(long, env = "TGB_RULES", value_delimiter = ',')]
    rules: Vec<String>,
    /// Roles that may be assumed, as globs; without any, TGB402 is not checked.
    #[arg(long, env = "TGB_ASSUME_ROLE_ALLOW", value_delimiter = ',')]
    assume_role_allow: Vec<String>,
    /// Tags that a target group must carry, as KEY or KEY=VALUE (with --aws).
    #[arg(long, env = "TGB_REQUIRE_TARGET_GROUP_TAG", value_delimiter = ',', requires = "aws")]
    require_target_group_tag: Vec<String>,
    /// The tag of a target group that lists the namespaces which may bind it (with --aws).
    #[arg(long, env = "TGB_NAMESPACE_BINDING_TAG", requires = "aws")]
    namespace_binding_tag: Option<String>,
    /// Take the Services and bindings of the current cluster into account.
    #[arg(long, env = "TGB_CLUSTER")]
    cluster: bool,
    /// Check what is in the cluster, too.
    #[arg(long, env = "TGB_ALL", requires = "cluster")]
    all: bool,
    /// Kubeconfig; otherwise the usual places.
    #[arg(long, env = "TGB_KUBECONFIG", requires = "cluster")]
    kubeconfig: Option<PathBuf>,
    /// Ask AWS for the target groups.
    #[arg(long, env = "TGB_AWS")]
    aws: bool,
    /// AWS region; otherwise from the environment or the instance's metadata.
    #[arg(long, env = "TGB_AWS_REGION", requires = "aws")]
    aws_region: Option<String>,
    /// Manifests, directories (all *.yaml, *.yml and *.json below, hidden directories left out), or - for stdin.
    #[arg(required_unless_present = "all")]
    inputs: Vec<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// `FILE:LINE: SEVERITY: PATH: ID MESSAGE`.
    Text,
    /// One JSON object.
    Json,
    /// SARIF 2.1.0, as code scanners read it.
    Sarif,
    /// Annotations of GitHub Actions.
    Github,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum FailOn {
    Error,
    Warning,
}

/// What a finding of the schema, which has no rule, is called.
const SCHEMA: &str = "schema";
/// The message about a missing field.
const REQUIRED: &str = "is required";

/// The refusals of a text's bindings by the schema and the rules about shape: all but what may be missing, since a
/// manifest may be the base that something else completes.
pub(crate) fn refusals(text: &str) -> Vec<String> {
    let mut input = Input::default();
    input.add("", Ok(text.to_owned()));
    let is_shape =
        |rule: &str| rule == SCHEMA || rules::rule(rule).is_some_and(|rule| rule.kind == rules::Kind::Shape);
    let found = input.check(&Settings::default()).into_iter();
    found
        .filter(|each| each.severity == Severity::Deny && is_shape(each.rule))
        .filter(|each| each.rule != "TGB101" && each.message != REQUIRED)
        .map(|each| format!("{}: {} {}", each.path, each.rule, each.message))
        .collect()
}

/// Runs the command.
pub(crate) fn main(options: &Options) -> ExitCode {
    let (input, findings) = match checked(options) {
        Ok(checked) => checked,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    for problem in &input.unusable {
        eprintln!("error: {problem}");
    }
    for object in &input.skipped {
        eprintln!("note: {object}");
    }
    let text = match options.output {
        Output::Text => text(&findings),
        Output::Json => format!("{:#}\n", as_json(&findings, &input)),
        Output::Sarif => format!("{:#}\n", sarif(&findings, &input)),
        Output::Github => github(&findings),
    };
    if crate::print(&text) != ExitCode::SUCCESS {
        return ExitCode::from(2);
    }
    let refused = findings.iter().filter(|finding| finding.severity == Severity::Deny).count();
    let warned = findings.len() - refused;
    eprintln!("{} bindings checked: {refused} errors, {warned} warnings", input.bindings.len());
    if !input.unusable.is_empty() {
        ExitCode::from(2)
    } else if refused > 0 || (options.fail_on == FailOn::Warning && warned > 0) {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

fn checked(options: &Options) -> Result<(Input, Vec<Located>), String> {
    let mut settings = settings(options)?;
    let runtime = if options.cluster || options.aws {
        // As `serve`: two providers in one binary would make rustls panic at the first connection.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let mut builder = tokio::runtime::Builder::new_current_thread();
        Some(builder.enable_all().build().map_err(|error| format!("no runtime: {error}"))?)
    } else {
        None
    };
    let mut input = Input::default();
    let mut stored = Vec::new();
    if let Some(runtime) = runtime.as_ref().filter(|_| options.cluster) {
        let found = runtime.block_on(surroundings::cluster(options.kubeconfig.as_deref()))?;
        stored = input.know(found);
    }
    for path in &options.inputs {
        if path.as_os_str() == "-" {
            input.add("<stdin>", read_text(std::io::stdin()));
        } else {
            input.add_path(path);
        }
    }
    input.add_stored(stored, options.all);
    if let Some(runtime) = runtime.as_ref().filter(|_| options.aws) {
        let questions = input.questions(&settings);
        let region = options.aws_region.as_deref();
        let asked = surroundings::aws(region, questions, settings.wants_tags());
        let (identity, described) = runtime.block_on(asked).map_err(|error| format!("AWS: {error}"))?;
        settings.region = Some(identity.region);
        settings.partition = Some(identity.partition);
        settings.account = Some(identity.account);
        input.described = described;
    }
    let findings = input.check(&settings);
    Ok((input, findings))
}

fn settings(options: &Options) -> Result<Settings, String> {
    let mut settings = Settings::of_tenants(
        &options.assume_role_allow,
        &options.require_target_group_tag,
        options.namespace_binding_tag.as_deref(),
    );
    if settings.assume_role_allow.is_empty() {
        settings.severities.insert("TGB402", Severity::Off);
    }
    // Any rule can be set here, also those that the controller enforces: files may hold what never meets in one cluster.
    settings.set_rules(&options.rules)?;
    Ok(settings)
}

/// Where a binding is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    /// A line of a file.
    File { name: String, line: u64 },
    /// `namespace/name` in the cluster.
    Cluster(String),
}

/// A finding and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Located {
    place: Place,
    severity: Severity,
    rule: &'static str,
    path: String,
    message: String,
}

impl Located {
    fn level(&self) -> &'static str {
        match self.severity {
            Severity::Deny => "error",
            Severity::Warn | Severity::Off => "warning",
        }
    }
}

// ---- input ----

/// All that was read.
#[derive(Debug)]
struct Input {
    bindings: Vec<Binding>,
    /// Bindings of the cluster that are not checked, but have target groups.
    others: Vec<TargetGroupBinding>,
    /// Bindings of the cluster whose place one of a file takes.
    stored: Vec<TargetGroupBinding>,
    services: Vec<Found>,
    /// Whether a Service that is not among them is missing.
    all_services: bool,
    /// The namespaces that ask for readiness gates, where they are known.
    injecting: Option<BTreeSet<String>>,
    /// What AWS says.
    described: Answers,
    /// The namespace of objects that name none.
    namespace: String,
    /// Findings on objects that are taken for bindings and are not.
    misplaced: Vec<Located>,
    /// Lines for the user about objects that are left alone.
    skipped: Vec<String>,
    /// Lines for the user.
    unusable: Vec<String>,
}

impl Default for Input {
    fn default() -> Self {
        Self {
            bindings: Vec::new(),
            others: Vec::new(),
            stored: Vec::new(),
            services: Vec::new(),
            all_services: false,
            injecting: None,
            described: Answers::new(),
            namespace: "default".to_owned(),
            misplaced: Vec::new(),
            skipped: Vec::new(),
            unusable: Vec::new(),
        }
    }
}

#[derive(Debug)]
struct Binding {
    origin: Origin,
    sent: Value,
    version: Option<Version>,
    /// The v1 form, if the types are right.
    parsed: Result<TargetGroupBinding, String>,
}

#[derive(Debug)]
enum Origin {
    /// A file, and the line of the document that holds it.
    File {
        name: String,
        document: u64,
        node: Spanned<Node>,
    },
    Cluster,
}

impl Binding {
    fn finding(&self, severity: Severity, rule: &'static str, path: &str, message: &str) -> Located {
        let place = match &self.origin {
            Origin::File { name, document, node } => {
                Place::File { name: name.clone(), line: document + line_of(node, path).saturating_sub(1) }
            }
            Origin::Cluster => Place::Cluster(label(&self.sent)),
        };
        Located { place, severity, rule, path: path.to_owned(), message: message.to_owned() }
    }

    fn file(&self) -> Option<&str> {
        match &self.origin {
            Origin::File { name, .. } => Some(name),
            Origin::Cluster => None,
        }
    }
}

/// `namespace/name`.
fn label(object: &Value) -> String {
    let text = |at| object.pointer(at).and_then(Value::as_str).unwrap_or_default();
    format!("{}/{}", text("/metadata/namespace"), text("/metadata/name"))
}

fn identity(binding: &TargetGroupBinding) -> (&str, &str) {
    (binding.namespace(), binding.name())
}

/// A Service.
#[derive(Debug)]
struct Found {
    /// Absent for one of the cluster.
    file: Option<String>,
    service: Service,
    /// The API server gives its ports a nodePort where none is written.
    allocates: bool,
}

impl Input {
    fn add_path(&mut self, path: &Path) {
        if !path.is_dir() {
            return self.add(&path.display().to_string(), read_file(path));
        }
        let mut files = Vec::new();
        self.walk(path, &mut files);
        if files.is_empty() {
            self.unusable.push(format!("{}: holds no *.yaml, *.yml or *.json", path.display()));
        }
        for file in files {
            self.add(&file.display().to_string(), read_file(&file));
        }
    }

    /// The manifests below a directory in the order of their names. Links to directories are not followed: they may
    /// lead in circles.
    fn walk(&mut self, directory: &Path, files: &mut Vec<PathBuf>) {
        let entries = std::fs::read_dir(directory).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let mut entries = match entries {
            Ok(entries) => entries,
            Err(error) => {
                return self.unusable.push(format!("{}: can't be read: {error}", directory.display()));
            }
        };
        entries.sort_by_key(std::fs::DirEntry::file_name);
        for entry in entries {
            let path = entry.path();
            let hidden = entry.file_name().to_string_lossy().starts_with('.');
            let manifest = path.extension().is_some_and(|ext| ext == "yaml" || ext == "yml" || ext == "json");
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                if !hidden {
                    self.walk(&path, files);
                }
            } else if manifest && !path.is_dir() {
                files.push(path);
            }
        }
    }

    fn add(&mut self, file: &str, text: Result<String, Unusable>) {
        let text = match text {
            Ok(text) => text,
            Err(problem) => return self.unusable.push(problem.of(file)),
        };
        for document in documents(&text) {
            match document.parse() {
                Ok(Some(node)) => self.add_object(file, document, node, None),
                Ok(None) => {}
                Err(problem) => self.unusable.push(problem.of(file)),
            }
        }
    }

    /// Takes up a binding, a Service or the items of a list; `of_list` is the `apiVersion` of a TargetGroupBindingList.
    fn add_object(
        &mut self,
        file: &str,
        document: Document<'_>,
        node: Spanned<Node>,
        of_list: Option<(&str, &str)>,
    ) {
        let word = |node: &Node, key: &str| match node.member(key).map(|member| &member.value) {
            Some(Node::Scalar(Value::String(text))) => text.clone(),
            _ => String::new(),
        };
        let (api_version, kind) = (word(&node.value, "apiVersion"), word(&node.value, "kind"));
        if let Some(of_kind) = kind.strip_suffix("List") {
            let of_list = (!of_kind.is_empty()).then_some((api_version.as_str(), of_kind));
            let Node::Mapping(members) = node.value else { return };
            let items = members.into_iter().find(|(key, _)| key == "items").map(|(_, items)| items.value);
            let Some(Node::Sequence(items)) = items else { return };
            for item in items {
                self.add_object(file, document, item, of_list);
            }
            return;
        }
        let mut sent = node.value.value();
        for patch in kustomize::patches(&sent) {
            let line = document.line_of(node.referenced.line());
            self.skipped.push(format!(
                "{file}:{line}: {patch} is for bindings and not applied here: lint what kubectl kustomize prints"
            ));
        }
        if let (Some((api_version, kind)), Value::Object(object)) = (of_list, &mut sent) {
            object.entry("apiVersion").or_insert_with(|| api_version.into());
            object.entry("kind").or_insert_with(|| kind.into());
        }
        if is_binding(&sent) {
            let version = sent.get("apiVersion").and_then(Value::as_str).and_then(Version::of_api_version);
            let parsed = parse(&sent, &self.namespace);
            let origin = Origin::File { name: file.to_owned(), document: document.line, node };
            self.bindings.push(Binding { origin, sent, version, parsed });
        } else if sent.get("kind") == Some(&json!("Service")) && sent.get("apiVersion") == Some(&json!("v1"))
        {
            // A Service that is not in order is somebody else's to tell.
            let Ok(object) = serde_json::from_value::<objects::Service>(sent) else { return };
            let mut service = Service::read(&object);
            if service.namespace.is_empty() {
                service.namespace = self.namespace.clone();
            }
            let refuses = object.spec.and_then(|spec| spec.allocate_load_balancer_node_ports) == Some(false);
            let allocates = service.has_node_ports() && !(refuses && service.service_type == "LoadBalancer");
            self.services.push(Found { file: Some(file.to_owned()), service, allocates });
        } else if let Some(strange) = Strange::of(&api_version, &kind) {
            let place = Place::File {
                name: file.to_owned(),
                line: document.line + node.referenced.line().saturating_sub(1),
            };
            self.misplace(place, strange);
        }
    }

    fn misplace(&mut self, place: Place, strange: Strange) {
        let (severity, path) = match strange.part {
            Some(part) => (strange.severity, part.to_owned()),
            None => {
                if let Place::File { name, line } = &place {
                    self.skipped.push(format!("{name}:{line}: {}", strange.message));
                }
                return;
            }
        };
        self.misplaced.push(Located { place, severity, rule: SCHEMA, path, message: strange.message });
    }

    /// Takes up what is in the cluster; gives the bindings back, since those of files go first.
    fn know(&mut self, stored: Stored) -> Vec<Value> {
        let found = |service| Found { file: None, service, allocates: false };
        self.services.extend(stored.services.into_iter().map(found));
        self.all_services = true;
        self.injecting = stored.injecting;
        self.namespace = stored.namespace;
        stored.bindings
    }

    /// Takes up bindings of the cluster, to check them or only as others. What a file holds takes the place of what is
    /// stored.
    fn add_stored(&mut self, stored: Vec<Value>, check: bool) {
        let of_files: BTreeSet<String> = self
            .bindings
            .iter()
            .filter_map(|binding| binding.parsed.as_ref().ok())
            .map(|parsed| format!("{}/{}", parsed.namespace(), parsed.name()))
            .collect();
        for sent in stored {
            let going = sent.pointer("/metadata/deletionTimestamp").is_some_and(|at| !at.is_null());
            if going {
                continue;
            }
            let parsed = parse(&sent, &self.namespace);
            if of_files.contains(&label(&sent)) {
                self.stored.extend(parsed.ok());
            } else if check {
                let version =
                    sent.get("apiVersion").and_then(Value::as_str).and_then(Version::of_api_version);
                self.bindings.push(Binding { origin: Origin::Cluster, sent, version, parsed });
            } else {
                self.others.extend(parsed.ok());
            }
        }
    }

    /// What AWS is to be asked. A role that may not be assumed is not.
    fn questions(&self, settings: &Settings) -> BTreeSet<Question> {
        let parsed = self.bindings.iter().filter_map(|binding| binding.parsed.as_ref().ok());
        let groups = parsed.map(|binding| &binding.spec.target_group);
        groups.filter(|group| settings.may_ask(group)).filter_map(question).collect()
    }

    /// The Service of a binding: one of the same file before one of another, and those before the cluster's.
    fn service(&self, file: Option<&str>, binding: &TargetGroupBinding) -> Option<&Found> {
        let wanted = |found: &&Found| {
            found.service.namespace == binding.namespace()
                && *found.service.name == *binding.spec.service_ref.name
        };
        self.services.iter().filter(wanted).min_by_key(|found| {
            let own = file.is_some() && found.file.as_deref() == file;
            (!own, found.file.is_none())
        })
    }

    fn check(&self, settings: &Settings) -> Vec<Located> {
        let schemas = crd(Version::V1);
        let mut all = self.misplaced.clone();
        for binding in &self.bindings {
            let mut found = self.check_one(binding, &schemas, settings);
            found.sort_by_key(|finding| match &finding.place {
                Place::File { line, .. } => *line,
                Place::Cluster(_) => 0,
            });
            all.extend(found);
        }
        all
    }

    fn check_one(&self, binding: &Binding, schemas: &Value, settings: &Settings) -> Vec<Located> {
        let Some(version) = binding.version else {
            let served = "unknown version; served are elbv2.k8s.aws/v1, /v1beta1 and /v1alpha1";
            return vec![binding.finding(Severity::Deny, SCHEMA, "apiVersion", served)];
        };
        let mut faults = Vec::new();
        if let Some(schema) = schema::of(schemas, version) {
            // A status in a file is ignored by the API server.
            let without =
                |(key, value): (&String, &Value)| (key != "status").then(|| (key.clone(), value.clone()));
            let object: Map<_, _> =
                binding.sent.as_object().into_iter().flatten().filter_map(without).collect();
            faults = schema::faults(schema, &Value::Object(object));
        }
        let path = "metadata.name".to_owned();
        let misnamed = misnamed(&binding.sent);
        faults.extend(misnamed.map(|message| Fault { severity: Severity::Deny, path, message }));
        let mut out: Vec<Located> = match &binding.parsed {
            Ok(parsed) => self.rules(binding, parsed, version, settings),
            Err(reason) => {
                if !faults.iter().any(|fault| fault.severity == Severity::Deny) {
                    let message = format!("can't be read: {}", excerpt(reason));
                    faults.push(Fault { severity: Severity::Deny, path: "spec".into(), message });
                }
                Vec::new()
            }
        };
        faults.retain(|fault| {
            !out.iter().any(|rule| rule.severity == Severity::Deny && rule.path == fault.path)
        });
        out.extend(
            faults.iter().map(|fault| binding.finding(fault.severity, SCHEMA, &fault.path, &fault.message)),
        );
        out
    }

    /// With what an update takes from the stored object.
    fn continued(&self, parsed: &TargetGroupBinding) -> TargetGroupBinding {
        let mut full = parsed.clone();
        if let Some(old) = self.stored.iter().find(|old| identity(old) == identity(parsed)) {
            defaulting::apply(&mut full.spec, &defaulting::from_old(parsed, old));
        }
        full
    }

    fn rules(
        &self,
        binding: &Binding,
        parsed: &TargetGroupBinding,
        version: Version,
        settings: &Settings,
    ) -> Vec<Located> {
        let found = self.service(binding.file(), parsed);
        let service = match found {
            Some(found) => Lookup::Found(&found.service),
            None if self.all_services => Lookup::Missing,
            None => Lookup::Unknown,
        };
        let described = question(&parsed.spec.target_group).and_then(|asked| self.described.get(&asked));
        let (group, tags) = match described {
            Some(Ok(Described { group, tags })) => {
                (group.as_ref().map_or(Lookup::Missing, Lookup::Found), tags.as_ref())
            }
            Some(Err(_)) | None => (Lookup::Unknown, None),
        };
        let parsed = &complete(&self.continued(parsed), group.found(), service.found());
        let checked = self.bindings.iter().filter_map(|other| other.parsed.as_ref().ok());
        let others: Vec<Other> = checked
            .chain(&self.others)
            .filter(|other| {
                let arn = parsed.spec.target_group.arn();
                arn.is_some() && other.spec.target_group.arn() == arn && identity(other) != identity(parsed)
            })
            .map(|other| Other {
                namespace: other.namespace().to_owned(),
                name: other.name().to_owned(),
                sharing: other.spec.target_group.sharing(),
            })
            .collect();
        let context = Context {
            service,
            target_group: group,
            named: match (group, parsed.spec.target_group.name()) {
                (Lookup::Found(found), Some(name)) if name == found.arn.name() => group,
                _ => Lookup::Unknown,
            },
            tags,
            others: Some(&others),
            injects: self.injecting.as_ref().map(|all| all.contains(parsed.namespace())),
            ..Default::default()
        };
        let unanswered = match described {
            Some(Err(reason)) => rules::aws_unavailable("spec.targetGroup", reason, false, true, settings),
            _ => None,
        };
        let version = version.name();
        check(Operation::Create, parsed, None, &context, settings)
            .into_iter()
            .chain(unanswered)
            .filter(|finding| !(finding.rule == "TGB205" && found.is_some_and(|found| found.allocates)))
            .map(|finding| {
                let path = path_in(version, &finding.path);
                binding.finding(finding.severity, finding.rule, &path, &finding.message_in(version))
            })
            .collect()
    }
}

/// A word about an object that is not a binding and looks like one.
struct Strange {
    severity: Severity,
    /// The field that is to blame; none where the object is in order, and another product's.
    part: Option<&'static str>,
    message: String,
}

impl Strange {
    fn of(api_version: &str, kind: &str) -> Option<Self> {
        // As in `targetgroupbinding`, `TargetGroupBindings`, `TargetGroup-Binding`.
        let letters: String =
            kind.chars().filter(char::is_ascii_alphabetic).collect::<String>().to_ascii_lowercase();
        let is_alike = letters.starts_with("targetgroupbind") || letters == "tgb";
        let group = api_version.rsplit_once('/').map_or(api_version, |(group, _)| group);
        let shown = (quoted(api_version), quoted(kind));
        let (severity, part, message) = match group {
            // Other kinds of the group are the AWS Load Balancer Controller's.
            names::GROUP if is_alike && kind != names::KIND => {
                let message = format!("{} has no kind {}; write {}", names::GROUP, shown.1, names::KIND);
                (Severity::Deny, Some("kind"), message)
            }
            _ if !is_alike => return None,
            "" => {
                let message = format!("is required; write {}; not checked", Version::V1.api_version());
                (Severity::Deny, Some("apiVersion"), message)
            }
            "eks.amazonaws.com" => {
                let message = format!("{} {kind} is EKS Auto Mode's own kind; not checked", api_version);
                (Severity::Warn, None, message)
            }
            _ => {
                let message = format!(
                    "{} is not the group of {}, which is {}; not checked",
                    shown.0,
                    names::KIND,
                    names::GROUP
                );
                (Severity::Warn, Some("apiVersion"), message)
            }
        };
        Some(Self { severity, part, message })
    }
}

fn parse(sent: &Value, namespace: &str) -> Result<TargetGroupBinding, String> {
    let mut sent = sent.clone();
    if let Value::Object(members) = &mut sent {
        convert::drop_nulls(members);
    }
    let hub = convert::convert(sent, Version::V1).map_err(|error| error.to_string())?;
    let mut parsed: TargetGroupBinding = serde_json::from_value(hub).map_err(|error| error.to_string())?;
    parsed.metadata.namespace.get_or_insert_with(|| namespace.to_owned());
    Ok(parsed)
}

/// With what defaulting would fill in.
fn complete(
    parsed: &TargetGroupBinding,
    group: Option<&TargetGroup>,
    service: Option<&Service>,
) -> TargetGroupBinding {
    let mut full = parsed.clone();
    defaulting::apply(&mut full.spec, &defaulting::from_lookups(parsed, group, service));
    full
}

/// The line of a path such as `spec.networking.ingress[0].from`, or of as much of it as there is.
fn line_of(node: &Spanned<Node>, path: &str) -> u64 {
    let mut at = node;
    for step in path.split(['.', '[']) {
        let next = match step.strip_suffix(']') {
            Some(index) => index.parse().ok().and_then(|index| at.value.item(index)),
            None => at.value.member(step),
        };
        let Some(next) = next else { break };
        at = next;
    }
    at.referenced.line()
}

/// The fault of the object's name, to the API server.
fn misnamed(object: &Value) -> Option<String> {
    let given = |at: &str| object.pointer(at).filter(|name| !name.is_null());
    // A few letters are added to the start of a name.
    let (name, rest) = match (given("/metadata/name"), given("/metadata/generateName")) {
        (Some(name), _) => (name, ""),
        (None, Some(start)) => (start, "a"),
        (None, None) => return Some(REQUIRED.to_owned()),
    };
    let Value::String(name) = name else {
        return Some(format!("must be a string, is {}", schema::describe(name)));
    };
    let is_label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte == b'-' || byte.is_ascii_digit() || byte.is_ascii_lowercase())
    };
    let fits = name.len() <= 253 && format!("{name}{rest}").split('.').all(is_label);
    (!fits).then(|| {
        format!(
            "{} is not a name: at most 253 of a-z, 0-9, '-' and '.', with a letter or digit at each end",
            quoted(name)
        )
    })
}

// ---- output ----

fn text(findings: &[Located]) -> String {
    findings.iter().fold(String::new(), |mut out, each| {
        let Located { place, rule, path, message, .. } = each;
        let _ = match place {
            Place::File { name, line } => write!(out, "{name}:{line}: "),
            Place::Cluster(object) => write!(out, "cluster: {object}: "),
        };
        let _ = writeln!(out, "{}: {path}: {rule} {message}", each.level());
        out
    })
}

fn as_json(findings: &[Located], input: &Input) -> Value {
    let findings: Vec<Value> = findings
        .iter()
        .map(|each| {
            let mut found = json!({"severity": each.level(), "rule": each.rule, "path": each.path,
                "message": each.message});
            if let Value::Object(found) = &mut found {
                match &each.place {
                    Place::File { name, line } => {
                        found.extend([("file".into(), json!(name)), ("line".into(), json!(line))]);
                    }
                    Place::Cluster(object) => found.extend([("object".into(), json!(object))]),
                }
            }
            found
        })
        .collect();
    json!({"bindings": input.bindings.len(), "findings": findings, "skipped": input.skipped,
        "unusable": input.unusable})
}

/// SARIF 2.1.0 (OASIS).
fn sarif(findings: &[Located], input: &Input) -> Value {
    let known: Vec<Value> = std::iter::once(json!({"id": SCHEMA,
            "shortDescription": {"text": "The object has the shape that the CustomResourceDefinition asks for."}}))
    .chain(rules::RULES.iter().map(sarif_rule))
    .collect();
    let results: Vec<Value> = findings
        .iter()
        .map(|each| {
            let location = match &each.place {
                Place::File { name, line } => json!({"physicalLocation": {
                    "artifactLocation": {"uri": uri(name)}, "region": {"startLine": (*line).max(1)}}}),
                Place::Cluster(object) => {
                    json!({"logicalLocations": [{"fullyQualifiedName": object, "kind": "resource"}]})
                }
            };
            json!({"ruleId": each.rule, "level": each.level(), "locations": [location],
                "message": {"text": format!("{}: {}", each.path, each.message)}})
        })
        .collect();
    let notification =
        |level: &'static str| move |text: &String| json!({"level": level, "message": {"text": text}});
    let told: Vec<Value> = input
        .unusable
        .iter()
        .map(notification("error"))
        .chain(input.skipped.iter().map(notification("note")))
        .collect();
    json!({
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{
            "tool": {"driver": {"name": "tgb-webhook", "version": env!("CARGO_PKG_VERSION"), "rules": known}},
            "invocations": [{"executionSuccessful": input.unusable.is_empty(), "toolExecutionNotifications": told}],
            "results": results,
        }],
    })
}

/// A rule as code scanners show it beside its findings.
fn sarif_rule(rule: &rules::Rule) -> Value {
    let level = if rule.severity == Severity::Deny { "error" } else { "warning" };
    json!({
        "id": rule.id,
        "shortDescription": {"text": format!("{}.", rule.summary)},
        "fullDescription": {"text": rule.explanation},
        "help": {"text": rule.explanation, "markdown": rule.explanation},
        "helpUri": rules::reference(rule.id),
        "defaultConfiguration": {"level": level},
    })
}

/// A path as a URI reference.
fn uri(path: &str) -> String {
    path.bytes().fold(String::new(), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
        out
    })
}

/// Workflow commands, which GitHub shows beside the line.
fn github(findings: &[Located]) -> String {
    let data = |text: &str| text.replace('%', "%25").replace('\r', "%0D").replace('\n', "%0A");
    let property = |text: &str| data(text).replace(':', "%3A").replace(',', "%2C");
    findings.iter().fold(String::new(), |mut out, each| {
        let (title, level) = (property(each.rule), each.level());
        let message = data(&format!("{}: {}", each.path, each.message));
        let _ = match &each.place {
            Place::File { name, line } => {
                writeln!(out, "::{level} file={},line={line},title={title}::{message}", property(name))
            }
            Place::Cluster(object) => writeln!(out, "::{level} title={title}::{}: {message}", data(object)),
        };
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ARN: &str = "arn:aws:elasticloadbalancing:eu-west-1:123456789012:targetgroup/web/0123456789abcdef";

    fn beta(name: &str, more: &str) -> String {
        format!(
            "apiVersion: elbv2.k8s.aws/v1beta1\nkind: TargetGroupBinding\nmetadata:\n  name: {name}\nspec:\n  \
             targetGroupARN: {ARN}\n  targetType: ip\n{more}"
        )
    }

    const SERVICE: &str = "---\napiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  selector: {app: web}\n  \
        ports: [{name: http, port: 80}]\n---\n";

    fn read(text: &str) -> Input {
        let mut input = Input::default();
        input.add("a.yaml", Ok(text.to_owned()));
        input
    }

    fn found(text: &str) -> Vec<(u64, Severity, &'static str, String)> {
        let settings = Settings::default();
        let findings = read(text).check(&settings);
        let line = |place| match place {
            Place::File { line, .. } => line,
            Place::Cluster(_) => 0,
        };
        findings.into_iter().map(|each| (line(each.place), each.severity, each.rule, each.path)).collect()
    }

    #[test]
    fn a_binding_that_is_in_order_has_no_findings() {
        assert_eq!(
            found(&format!("{SERVICE}{}", beta("web", "  serviceRef: {name: web, port: http}\n"))),
            []
        );
    }

    #[test]
    fn a_port_is_looked_up_in_the_service_of_the_same_input_and_told_with_its_line() {
        let text = format!("{SERVICE}{}", beta("web", "  serviceRef:\n    name: web\n    port: 8080\n"));
        let line = u64::try_from(text.lines().position(|line| line.contains("8080")).unwrap()).unwrap() + 1;
        assert_eq!(found(&text), [(line, Severity::Deny, "TGB204", "spec.serviceRef.port".to_owned())]);
        let elsewhere = text.replace("metadata: {name: web}", "metadata: {name: web, namespace: other}");
        assert_eq!(found(&elsewhere), []);
    }

    #[test]
    fn an_omitted_port_is_filled_in_from_the_services_only_one() {
        assert_eq!(found(&format!("{SERVICE}{}", beta("web", "  serviceRef: {name: web}\n"))), []);
    }

    #[test]
    fn a_node_port_that_the_api_server_will_allocate_is_not_missed() {
        let binding = beta("web", "  serviceRef: {name: web, port: 80}\n")
            .replace("targetType: ip", "targetType: instance");
        let rules = |text: &str| found(text).into_iter().map(|each| each.2).collect::<Vec<_>>();
        assert_eq!(rules(&format!("{SERVICE}{binding}")), ["TGB205"]);
        assert_eq!(
            rules(&format!("{}{binding}", SERVICE.replace("spec:", "spec:\n  type: NodePort"))),
            [""; 0]
        );
    }

    #[test]
    fn two_bindings_of_one_target_group_are_both_found() {
        let text = format!(
            "{}---\n{}",
            beta("a", "  serviceRef: {name: web, port: 80}\n"),
            beta("b", "  serviceRef: {name: web, port: 80}\n")
        );
        let rules: Vec<_> = found(&text).into_iter().map(|each| each.2).collect();
        assert_eq!(rules, ["TGB115", "TGB115"]);
    }

    #[test]
    fn paths_are_those_of_the_documents_version_and_lists_are_looked_into() {
        let item = beta("a", "  serviceRef: {name: web, port: 80}\n").replace(ARN, "nonsense");
        let list =
            format!("apiVersion: v1\nkind: List\nitems:\n- {}\n", item.trim_end().replace('\n', "\n  "));
        assert_eq!(found(&list), [(9, Severity::Deny, "TGB102", "spec.targetGroupARN".to_owned())]);
    }

    #[test]
    fn an_unknown_field_is_a_warning_and_a_wrong_type_an_error() {
        let text = beta("a", "  serviceRef: {name: web, port: 80}\n  serviceref: {}\n");
        assert_eq!(found(&text), [(9, Severity::Warn, SCHEMA, "spec.serviceref".to_owned())]);
        let text = beta("a", "  serviceRef: {name: 5, port: 80}\n");
        assert_eq!(found(&text), [(8, Severity::Deny, SCHEMA, "spec.serviceRef.name".to_owned())]);
        let text = beta("a", "  serviceRef: {port: 80}\n");
        assert_eq!(found(&text), [(8, Severity::Deny, "TGB212", "spec.serviceRef.name".to_owned())]);
    }

    #[test]
    fn a_name_that_yaml_reads_as_a_boolean_is_an_error() {
        let text = beta("yes", "  serviceRef: {name: web, port: 80}\n");
        assert_eq!(found(&text), [(4, Severity::Deny, SCHEMA, "metadata.name".to_owned())]);
    }

    #[test]
    fn a_document_that_is_no_yaml_is_told_and_the_others_are_checked() {
        let input = read(&format!("a: [\n---\n{}", beta("a", "  serviceRef: {name: web, port: 80}\n")));
        assert_eq!((input.unusable.len(), input.bindings.len()), (1, 1));
        assert!(input.unusable[0].starts_with("a.yaml:"), "{:?}", input.unusable);
    }

    #[test]
    fn a_patch_of_a_binding_is_not_passed_over_in_silence() {
        let patch = |target: &str| format!("patches:\n- target: {{{target}}}\n  path: patch.yaml\n");
        let skipped = read(&patch("kind: TargetGroupBinding")).skipped;
        assert_eq!(skipped.len(), 1);
        assert!(skipped[0].starts_with("a.yaml:1: patches[0] is for bindings"), "{skipped:?}");
        assert_eq!(read(&patch("kind: Deployment")).skipped, [""; 0]);
        let inline =
            format!("patchesStrategicMerge:\n- |\n  {}\n", beta("a", "").trim_end().replace('\n', "\n  "));
        assert_eq!(read(&inline).skipped.len(), 1);
    }

    #[test]
    fn json_is_read_like_yaml() {
        let object = json!({"apiVersion": "elbv2.k8s.aws/v1", "kind": "TargetGroupBinding", "metadata": {"name": "a"},
            "spec": {"targetGroup": {}, "serviceRef": {"name": "web", "port": 80}}});
        let rules: Vec<_> = found(&format!("{object:#}")).into_iter().map(|each| (each.2, each.3)).collect();
        assert_eq!(rules, [("TGB101", "spec.targetGroup".to_owned())]);
    }

    #[test]
    fn annotations_for_github_and_sarif_keep_odd_file_names_apart() {
        let finding = Located {
            place: Place::File { name: "a,b c.yaml".into(), line: 3 },
            severity: Severity::Warn,
            rule: "TGB306",
            path: "spec".into(),
            message: "100%\nopen".into(),
        };
        let all = [finding];
        assert_eq!(github(&all), "::warning file=a%2Cb c.yaml,line=3,title=TGB306::spec: 100%25%0Aopen\n");
        let made = sarif(&all, &Input::default());
        let place = &made["runs"][0]["results"][0]["locations"][0]["physicalLocation"];
        assert_eq!(place["artifactLocation"]["uri"], "a%2Cb%20c.yaml");
        assert_eq!(place["region"]["startLine"], 3);
        let rules = made["runs"][0]["tool"]["driver"]["rules"].as_array().unwrap();
        let rule = rules.iter().find(|rule| rule["id"] == "TGB306").unwrap();
        assert_eq!(rule["helpUri"], "docs/rules.md#tgb306");
        assert_eq!(rule["shortDescription"]["text"], "Targets are not open to the whole internet.");
    }

    #[test]
    fn objects_that_look_like_bindings_and_are_none_are_told() {
        let object = |api_version: &str, kind: &str| {
            format!(
                "---\napiVersion: {api_version}\nkind: {kind}\nmetadata: {{name: web}}\nspec: {{targetGroupARN: junk}}\n"
            )
        };
        let of_others = [
            object("eks.amazonaws.com/v1", "TargetGroupBinding"),
            object("elbv2.aws/v1beta1", "TargetGroupBinding"),
            object("elbv2.k8s.aws/v1beta1", "TargetGroupBindings"),
            object("elbv2.k8s.aws/v1", "targetgroupbinding"),
            object("\"\"", "TargetGroupBinding"),
            object("elbv2.k8s.aws/v1beta1", "IngressClassParams"),
            object("gateway.k8s.aws/v1beta1", "TargetGroupConfiguration"),
        ];
        let input = read(&of_others.concat());
        assert_eq!(input.bindings.len(), 0);
        assert_eq!(
            input.skipped,
            ["a.yaml:2: eks.amazonaws.com/v1 TargetGroupBinding is EKS Auto Mode's own kind; not checked"]
        );
        let findings = input.check(&Settings::default());
        let told: Vec<_> = findings.iter().map(|each| (each.severity, each.path.as_str())).collect();
        assert_eq!(
            told,
            [
                (Severity::Warn, "apiVersion"),
                (Severity::Deny, "kind"),
                (Severity::Deny, "kind"),
                (Severity::Deny, "apiVersion")
            ]
        );
        assert_eq!(
            findings[1].message,
            "elbv2.k8s.aws has no kind \"TargetGroupBindings\"; write TargetGroupBinding"
        );
        assert_eq!(findings[0].place, Place::File { name: "a.yaml".into(), line: 7 });
    }

    #[test]
    fn what_the_cluster_holds_takes_part_and_is_checked_on_demand() {
        let bindings = |arn: &str| {
            json!({"apiVersion": "elbv2.k8s.aws/v1beta1", "kind": "TargetGroupBinding",
                "metadata": {"name": "stored", "namespace": "shop"},
                "spec": {"targetGroupARN": arn, "targetType": "ip", "serviceRef": {"name": "api", "port": 80}}})
        };
        let stored = |arn: &str| Stored {
            namespace: "shop".to_owned(),
            services: vec![Service {
                namespace: "shop".into(),
                name: "web".into(),
                selector: Some([("app".to_owned(), "web".to_owned())].into()),
                ..Service::default()
            }],
            bindings: vec![bindings(arn)],
            injecting: None,
        };
        let found = |arn: &str, text: &str, all: bool| {
            let mut input = Input::default();
            let stored = input.know(stored(arn));
            input.add("a.yaml", Ok(text.to_owned()));
            input.add_stored(stored, all);
            input.check(&Settings::default()).into_iter()
        };
        let rules = |arn: &str, text: &str, all: bool| {
            found(arn, text, all).map(|each| (each.rule, each.place)).collect::<Vec<_>>()
        };
        let file = |line| Place::File { name: "a.yaml".into(), line };
        let text = beta("web", "  serviceRef: {name: web, port: 80}\n");
        assert_eq!(rules(ARN, &text, false), [("TGB115", file(6)), ("TGB204", file(8))]);
        let in_cluster = Place::Cluster("shop/stored".to_owned());
        assert_eq!(rules("nonsense", "", true), [("TGB102", in_cluster.clone()), ("TGB201", in_cluster)]);
        // The file's version of a stored binding takes its place.
        let same = beta("stored", "  serviceRef: {name: api, port: 80}\n");
        assert_eq!(rules(ARN, &same, true), [("TGB201", file(8))]);
        // What the file leaves out is taken from the stored one, as on `apply`: the port here, so this is a warning.
        let bare = beta("stored", "  serviceRef: {name: api}\n");
        let severities =
            |text: &str| found(ARN, text, false).map(|each| (each.rule, each.severity)).collect::<Vec<_>>();
        assert_eq!(severities(&bare), [("TGB201", Severity::Warn)]);
        assert_eq!(
            severities(&bare.replace("stored", "new")),
            [("TGB115", Severity::Deny), ("TGB201", Severity::Deny)]
        );
    }

    #[test]
    fn manifests_are_found_in_directories_below_and_hidden_ones_left_out() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [("b/x.yml", "a: 1"), ("a.json", "{}"), (".git/y.yaml", "["), ("z.txt", "[")] {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let (mut input, mut files) = (Input::default(), Vec::new());
        input.walk(dir.path(), &mut files);
        assert_eq!(files, [dir.path().join("a.json"), dir.path().join("b/x.yml")]);
        input.add_path(&dir.path().join(".git/nothing.yaml"));
        assert_eq!(input.unusable.len(), 1);
    }
}
