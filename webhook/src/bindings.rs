//! The two reviews of bindings: both complete the object and hold it against every rule; the mutating one answers with
//! the patch as well.

use crate::admission::{self, Answer, Cause, Objects, Request};
use crate::lookup::{Asker, Cluster, FRESH, KNOWN, Registered, TargetGroups};
use crate::metrics::Metrics;
use serde_json::Value;
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tgb_api::arn::TargetGroupArn;
use tgb_api::defaulting;
use tgb_api::names;
use tgb_api::review::Sent;
use tgb_api::rules::{self, Context, Finding, Lookup, Operation, Other, RestsOn, Severity};
use tgb_api::service::Service;
use tgb_api::target_group::{TargetGroup, TargetType};
use tgb_api::text::{excerpt, is_dns_label};
use tgb_api::v1::{Sharing, TargetGroupBinding, TargetGroupRef};
use tgb_aws::{AwsError, TargetGroupQuery};
use tokio::time::{Instant, timeout_at};

/// What is kept of a review's time for a last look at the Service, once AWS has not answered; less of a short one.
const FOR_THE_SERVICE: Duration = Duration::from_millis(500);

/// The longest name of an object.
const LONGEST_NAME: usize = 253;

/// What the reviews work with.
pub(crate) struct Bindings {
    /// The cluster.
    pub(crate) cluster: Cluster,
    /// AWS, as soon as it is known how to reach it.
    pub(crate) aws: tokio::sync::watch::Receiver<Connection>,
    /// What the operator decided, with what AWS says of us.
    pub(crate) settings: tokio::sync::watch::Receiver<Arc<rules::Settings>>,
    /// `--aws-unavailable=admit`.
    pub(crate) admit_without_aws: bool,
    /// Where findings are counted.
    pub(crate) metrics: Arc<Metrics>,
}

/// Whether AWS can be asked.
#[derive(Clone)]
pub(crate) enum Connection {
    /// Region and credentials are being looked for.
    Looking,
    /// They were not found; why.
    Failed(String),
    /// They were.
    Made(Arc<TargetGroups>),
}

/// A review in progress.
struct Review<'a> {
    /// As [`Request::uid`].
    uid: &'a str,
    operation: Operation,
    mutating: bool,
    old: Option<&'a TargetGroupBinding>,
    settings: &'a rules::Settings,
    deadline: Instant,
    /// When AWS must have answered.
    aws_deadline: Instant,
}

/// What was looked up for it.
struct Facts {
    aws: FromAws,
    service: Lookup<Arc<Service>>,
    /// Why nothing is known of the Service.
    unread: Option<String>,
    others: Option<Vec<Other>>,
    injects: Option<bool>,
    /// Number of registered targets that are not the binding's own.
    foreign: Option<usize>,
}

/// What AWS said, or why it said nothing.
#[derive(Default)]
struct FromAws {
    group: Lookup<Arc<TargetGroup>>,
    named: Lookup<Arc<TargetGroup>>,
    tags: Option<Arc<BTreeMap<String, String>>>,
    targets: Option<Arc<[Registered]>>,
    failure: Option<Failure>,
}

struct Failure {
    reason: String,
    /// Only a warning rests on what is missing.
    slight: bool,
}

fn borrow<T>(lookup: &Lookup<Arc<T>>) -> Lookup<&T> {
    match lookup {
        Lookup::Unknown => Lookup::Unknown,
        Lookup::Missing => Lookup::Missing,
        Lookup::Found(value) => Lookup::Found(value),
    }
}

fn looked_up<T>(found: Option<T>) -> Lookup<T> {
    found.map_or(Lookup::Missing, Lookup::Found)
}

impl Facts {
    fn context(&self) -> Context<'_> {
        Context {
            service: borrow(&self.service),
            target_group: borrow(&self.aws.group),
            named: borrow(&self.aws.named),
            tags: self.aws.tags.as_deref(),
            registered: self.aws.targets.as_ref().map(|targets| targets.len()),
            foreign: self.foreign,
            others: self.others.as_deref(),
            injects: self.injects,
        }
    }
}

impl Review<'_> {
    fn creates(&self) -> bool {
        self.operation == Operation::Create
    }

    /// Whether what `part` takes out of the target group differs from the stored object's.
    fn changes<'b, T: PartialEq>(
        &'b self,
        new: &'b TargetGroupBinding,
        part: impl Fn(&'b TargetGroupRef) -> T,
    ) -> bool {
        self.old.is_none_or(|old| part(&old.spec.target_group) != part(&new.spec.target_group))
    }

    /// Whether a rule or a default that looks now needs AWS.
    fn needs_aws(&self, new: &TargetGroupBinding) -> bool {
        let Some(old) = self.old.filter(|_| !self.creates()) else { return true };
        let group = &new.spec.target_group;
        let but_sharing = |group: &TargetGroupRef| TargetGroupRef { sharing: None, ..group.clone() };
        but_sharing(&old.spec.target_group) != but_sharing(group)
            || defaulting::needs_target_group(group)
            || self.becomes_exclusive(new)
            || (group.target_type != Some(TargetType::Ip) && old.spec.service_ref != new.spec.service_ref)
    }

    fn becomes_exclusive(&self, new: &TargetGroupBinding) -> bool {
        let was_shared = self.old.is_some_and(|old| old.spec.target_group.sharing() == Sharing::Shared);
        was_shared && new.spec.target_group.sharing() == Sharing::Exclusive
    }

    /// Whether it is to be known how many targets there are (TGB118, TGB119).
    fn counts_targets(&self, new: &TargetGroupBinding) -> bool {
        let off = |id| self.settings.severities.get(id) == Some(&Severity::Off);
        let exclusive = new.spec.target_group.sharing() == Sharing::Exclusive;
        (self.creates() && exclusive && !off("TGB118"))
            || (!self.creates() && self.becomes_exclusive(new) && !off("TGB119"))
    }

    fn findings(&self, new: &TargetGroupBinding, facts: &Facts) -> Vec<Finding> {
        rules::check(self.operation, new, self.old, &facts.context(), self.settings)
    }
}

impl Bindings {
    /// Answers a review; `mutating` says which one. `within` is the time that is left for it.
    ///
    /// # Errors
    /// A sentence for HTTP 500, if the port has to be filled in from a Service that can't be read.
    pub(crate) async fn review(
        &self,
        request: &Request<'_>,
        objects: Objects<Sent>,
        mutating: bool,
        within: Duration,
    ) -> Result<Answer, String> {
        let operation = match request.operation() {
            "CREATE" => Operation::Create,
            "UPDATE" => Operation::Update,
            _ => return Ok(Answer::default()),
        };
        let Some(sent) = objects.new.filter(|_| !request.is_of_subresource()) else {
            return Ok(Answer::default());
        };
        let (mut new, there) = match sent {
            Ok(read) => read,
            // Of a wrong type somewhere: the schema, which comes after the mutating review, says where.
            Err(_) if mutating => return Ok(Answer::default()),
            Err(error) => {
                let error = error.to_string();
                let warnings =
                    vec![format!("spec: not checked, since it can't be read: {}", excerpt(&error))];
                return Ok(Answer { warnings, ..Answer::default() });
            }
        };
        let mut old = objects.old.and_then(Result::ok).map(|(old, _)| old);
        for binding in std::iter::once(&mut new).chain(&mut old) {
            binding.metadata.namespace = Some(request.namespace().to_owned());
        }
        let old = old.as_ref().filter(|_| operation == Operation::Update);
        // Until the API server has gone over it, a new object's deletionTimestamp is whatever its author wrote.
        let is_terminating = match operation {
            Operation::Create => false,
            Operation::Update => old.unwrap_or(&new).is_terminating(),
        };
        let settings = Arc::clone(&self.settings.borrow());
        if is_terminating || old.is_some_and(|old| old.spec == new.spec) {
            // Annotations may have changed, of which the rules warn; nothing is looked up for that.
            let nothing = Context::default();
            let findings = match is_terminating || mutating {
                true => Vec::new(),
                false => rules::check(operation, &new, old, &nothing, &settings),
            };
            let patch = if mutating { defaulting::patch(there, &[]) } else { Vec::new() };
            return Ok(self.answer(request, &new, mutating, findings, Vec::new(), patch));
        }
        let now = Instant::now();
        let review = Review {
            uid: request.uid(),
            operation,
            mutating,
            old,
            settings: &settings,
            deadline: now + within,
            aws_deadline: now + within.saturating_sub(FOR_THE_SERVICE.min(within / 4)),
        };

        let mut additions = match old.filter(|_| mutating) {
            Some(old) => defaulting::from_old(&new, old),
            None => Vec::new(),
        };
        defaulting::apply(&mut new.spec, &additions);

        let (mut facts, live) = self.look_up(&review, &new).await;
        // What AWS has to say before the object is complete. One that was stored incomplete stays editable.
        let incomplete = defaulting::needs_target_group(&new.spec.target_group)
            && review.changes(&new, |group| (group.arn(), group.name(), group.role().map(|r| r.role_arn)));
        if mutating {
            let context = facts.context();
            let more = defaulting::from_lookups(&new, context.target_group.found(), context.service.found());
            defaulting::apply(&mut new.spec, &more);
            additions.extend(more);
        }
        let group = &new.spec.target_group;
        if let Some(arn) = group.arn() {
            tracing::Span::current().record("arn", &*told_arn(arn));
        }
        facts.others = match group.arn() {
            Some(arn) => self.cluster.in_the_way(arn, new.namespace(), new.name(), group.sharing()),
            None => Some(Vec::new()),
        };
        facts.foreign = self.foreign(&review, &new, &facts).await;
        let mut findings = review.findings(&new, &facts);
        let rests_on = |findings: &[Finding], what| {
            findings.iter().any(|finding| rules::rule(finding.rule).is_some_and(|rule| rule.rests_on == what))
        };
        if !live
            && rests_on(&findings, RestsOn::Service)
            && let Ok(service) = Box::pin(self.live(&review, &new)).await
        {
            facts.service = looked_up(service);
            findings = review.findings(&new, &facts);
        }
        if rests_on(&findings, RestsOn::Bindings)
            && let (Some(arn), Some(others)) = (group.arn(), facts.others.take())
        {
            facts.others = Some(Box::pin(self.still_there(&review, arn, others)).await);
            findings = review.findings(&new, &facts);
        }
        let path = if group.arn().is_some() { "spec.targetGroup.arn" } else { "spec.targetGroup.name" };
        if let Some(Failure { reason, slight }) = &facts.aws.failure {
            let needed = incomplete && matches!(facts.aws.group, Lookup::Unknown);
            let admit = self.admit_without_aws || *slight;
            findings.extend(rules::aws_unavailable(path, reason, needed, admit, review.settings));
            findings.sort_by_key(|finding| finding.severity);
        }
        let mut notes = Vec::new();
        if facts.others.is_none() {
            let path = rules::path_in(request.user_version(), path);
            notes.push(format!(
                "{path}: TGB115 not checked: the list of bindings may not be complete now; the controller decides"
            ));
        }
        if let Some(reason) = &facts.unread {
            let service = format!("Service {}/{}", new.namespace(), new.spec.service_ref.name);
            let refused = findings.iter().any(|finding| finding.severity == Severity::Deny);
            let other = old.is_none_or(|old| old.spec.service_ref != new.spec.service_ref);
            if new.spec.service_ref.port().is_none() && other && !refused {
                return Err(format!(
                    "{service} can't be read, and the port can only be filled in from it: {reason}"
                ));
            }
            notes.push(format!("spec.serviceRef: not checked, since {service} can't be read: {reason}"));
        }
        let patch = if mutating { defaulting::patch(there, &additions) } else { Vec::new() };
        Ok(self.answer(request, &new, mutating, findings, notes, patch))
    }

    /// What the rules rest on, all at once; and whether the Service is as it is now, not as it was last seen.
    async fn look_up(&self, review: &Review<'_>, new: &TargetGroupBinding) -> (Facts, bool) {
        let (namespace, name) = (new.namespace(), &*new.spec.service_ref.name);
        let cached = self.cluster.cached_service(namespace, name);
        // A port is filled in for good, so from the Service as it is.
        let fills_port = review.mutating && new.spec.service_ref.port().is_none();
        let (service, live) = match cached {
            Some(found) if !fills_port => (Some(found), false),
            found => (found, is_dns_label(name)),
        };
        let service = async {
            let cached = service.map_or(Lookup::Unknown, Lookup::Found);
            if !live {
                return (cached, false, None);
            }
            // Boxed, as all that most reviews don't need: what a review may need is made room for, and moved.
            match Box::pin(self.live(review, new)).await {
                Ok(found) => (looked_up(found), true, None),
                Err(reason) => {
                    let unread = matches!(cached, Lookup::Unknown).then_some(reason);
                    (cached, false, unread)
                }
            }
        };
        let injects = async {
            // The only rule that asks is about long names.
            if review.creates() && new.name().len() > 63 {
                timeout_at(review.deadline, Box::pin(self.cluster.injects(namespace))).await.ok().flatten()
            } else {
                None
            }
        };
        let aws = async {
            let asks = review.needs_aws(new) && review.settings.may_ask(&new.spec.target_group);
            if asks { Box::pin(self.ask_aws(review, new)).await } else { FromAws::default() }
        };
        let (aws, (service, live, unread), injects) = tokio::join!(aws, service, injects);
        (Facts { aws, service, unread, others: None, injects, foreign: None }, live)
    }

    /// The Service as it is, or why it can't be read.
    async fn live(
        &self,
        review: &Review<'_>,
        new: &TargetGroupBinding,
    ) -> Result<Option<Arc<Service>>, String> {
        let (namespace, name) = (new.namespace(), &*new.spec.service_ref.name);
        if !is_dns_label(name) {
            return Ok(None);
        }
        let error = match timeout_at(review.deadline, self.cluster.live_service(namespace, name)).await {
            Ok(Ok(found)) => return Ok(found),
            Ok(Err(kube::Error::Api(status))) => status.message,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "the API server did not answer in time".to_owned(),
        };
        let (uid, object) = (review.uid, format_args!("{namespace}/{}", new.name()));
        tracing::warn!(error, uid, object = %object, service = name, "a Service can't be read");
        Err(error)
    }

    /// Number of the registered targets that a new binding does not register itself: those that are no endpoints of its Service,
    /// or of nodes at another port than its nodePort. Whose nodes they are is not asked.
    async fn foreign(&self, review: &Review<'_>, new: &TargetGroupBinding, facts: &Facts) -> Option<usize> {
        let targets = facts.aws.targets.as_ref().filter(|_| review.creates())?;
        let reference = &new.spec.service_ref;
        if matches!(facts.service, Lookup::Unknown) {
            return None;
        }
        let service = borrow(&facts.service).found();
        let count = |is_own: &dyn Fn(&Registered) -> bool| targets.iter().filter(|it| !is_own(it)).count();
        if new.spec.target_group.target_type == Some(TargetType::Instance) {
            let port = service.and_then(|it| it.port(reference.port()?, new.spec.target_group.protocol));
            let node_port = port.and_then(|port| port.node_port);
            return Some(count(&|target| Some(target.port) == node_port));
        }
        if targets.is_empty() || service.is_none() {
            return Some(targets.len());
        }
        let endpoints = Box::pin(self.cluster.endpoints(new.namespace(), &reference.name));
        let endpoints = timeout_at(review.deadline, endpoints).await.ok().flatten()?;
        Some(count(&|target| target.id.parse().is_ok_and(|address| endpoints.contains(&address))))
    }

    /// Those of other bindings that have the target group now, too, as far as one of them is known to: an interrupted watch
    /// refuses nothing.
    async fn still_there(&self, review: &Review<'_>, arn: &str, others: Vec<Other>) -> Vec<Other> {
        let mut left = others.into_iter();
        while let Some(other) = left.next() {
            let has_it = self.cluster.has_target_group(&other.namespace, &other.name, arn);
            // Without an answer, the list is what there is.
            if timeout_at(review.deadline, has_it).await.ok().flatten().unwrap_or(true) {
                return std::iter::once(other).chain(left).collect();
            }
        }
        Vec::new()
    }

    async fn ask_aws(&self, review: &Review<'_>, new: &TargetGroupBinding) -> FromAws {
        let mut out = FromAws::default();
        let group = &new.spec.target_group;
        let deadline = review.aws_deadline;
        let named = group.arn().or(group.name()).unwrap_or_default();
        let failed = |reason: String| Some(Failure { reason, slight: false });
        let aws = match self.connection(deadline).await {
            Ok(aws) => aws,
            Err(reason) => return FromAws { failure: failed(reason), ..out },
        };
        let role = group.role();
        // Both reviews of an `apply` need not wait for an AWS that does not answer.
        if !review.mutating
            && let Some(reason) = aws.failure(role, named)
        {
            return FromAws { failure: failed(reason), ..out };
        }
        let asker = Asker { namespace: new.namespace(), role };
        let most = if review.creates() { FRESH } else { KNOWN };
        let tags = async |arn| match review.settings.wants_tags() {
            true => told(timeout_at(deadline, aws.tags(asker, arn)).await),
            false => Ok(None),
        };
        let count = async |arn| match review.counts_targets(new) {
            true => told(timeout_at(deadline, aws.registered(asker, arn)).await),
            false => Ok(None),
        };
        let describe =
            async |query| told(timeout_at(deadline, aws.describe(asker, query, most)).await).map(looked_up);
        let (described, tags, count) = match group.arn() {
            Some(arn) => {
                tokio::join!(describe(TargetGroupQuery::Arn(arn)), tags(arn), count(arn))
            }
            None => {
                let described = describe(TargetGroupQuery::Name(named)).await;
                let (tags, count) = match &described {
                    Ok(Lookup::Found(found)) => {
                        tokio::join!(tags(found.arn.as_str()), count(found.arn.as_str()))
                    }
                    _ => (Ok(None), Ok(None)),
                };
                (described, tags, count)
            }
        };
        match described {
            Ok(found) => out.group = found,
            Err(reason) => {
                aws.failed(role, named, &reason);
                return FromAws { failure: failed(reason), ..out };
            }
        }
        let Lookup::Found(found) = &out.group else { return out };
        if group.arn().is_some() && group.name() == Some(found.arn.name()) {
            // Names are unique per account and region, and part of the ARN.
            out.named = Lookup::Found(Arc::clone(found));
        }
        match tags {
            Ok(tags) => out.tags = tags,
            Err(reason) => out.failure = failed(reason),
        }
        match count {
            Ok(targets) => out.targets = targets,
            Err(reason) if out.failure.is_none() => {
                out.failure = Some(Failure { reason, slight: review.creates() });
            }
            Err(_) => {}
        }
        out
    }

    async fn connection(&self, deadline: Instant) -> Result<Arc<TargetGroups>, String> {
        let mut aws = self.aws.clone();
        let known = |connection: &Connection| !matches!(connection, Connection::Looking);
        match timeout_at(deadline, aws.wait_for(known)).await {
            Ok(Ok(found)) => match &*found {
                Connection::Made(aws) => Ok(Arc::clone(aws)),
                Connection::Failed(reason) => Err(reason.clone()),
                Connection::Looking => Err("no AWS region is known yet".to_owned()),
            },
            _ => Err("no AWS region is known yet".to_owned()),
        }
    }

    fn answer(
        &self,
        request: &Request<'_>,
        new: &TargetGroupBinding,
        mutating: bool,
        findings: Vec<Finding>,
        notes: Vec<String>,
        patch: Vec<Value>,
    ) -> Answer {
        let version = request.user_version();
        let (refused, warned): (Vec<_>, Vec<_>) =
            findings.into_iter().partition(|f| f.severity == Severity::Deny);
        for finding in &refused {
            self.metrics.finding(finding.rule, "refused");
        }
        // What the mutating review warns of, the validating one does again, unless the object is refused.
        for finding in warned.iter().filter(|_| !mutating || !refused.is_empty()) {
            self.metrics.finding(finding.rule, "warned");
        }
        let mut warnings: Vec<String> = warned.iter().map(|finding| finding.in_version(version)).collect();
        warnings.extend(notes);
        if refused.is_empty() {
            return Answer { patch, warnings, ..Answer::default() };
        }
        let references = references(&refused);
        let told = || refused.iter().zip(&references);
        let lines: Vec<String> =
            told().map(|(finding, see)| finding.in_version(version) + see.as_str()).collect();
        let name = match (new.name(), new.metadata.generate_name.as_deref()) {
            ("", Some(prefix)) => prefix,
            (name, _) => name,
        };
        // Longer ones are refused by the API server, later.
        let name: String = name.chars().take(LONGEST_NAME).collect();
        let (uid, object) = (request.uid(), format_args!("{}/{name}", new.namespace()));
        let arn = new.spec.target_group.arn().map(told_arn);
        tracing::info!(uid, object = %object, arn = arn.as_deref(), findings = lines.join("; "), "refused a binding");
        let refusal = if refused.iter().any(|finding| finding.kind == rules::Kind::Shape) {
            let cause = |(finding, see): (&Finding, &String)| {
                let field = rules::path_in(version, &finding.path);
                Cause::new(field, format!("{} {}{see}", finding.rule, finding.message_in(version)))
            };
            admission::invalid(names::GROUP, names::KIND, &name, told().map(cause).collect())
        } else {
            admission::forbidden(&lines)
        };
        let rule = refused.first().map_or("", |finding| finding.rule);
        Answer { warnings, refusal: Some(refusal), rule, ..Answer::default() }
    }
}

/// Where to read on, behind the last finding of each rule.
fn references(findings: &[Finding]) -> Vec<String> {
    let mut told = BTreeSet::new();
    let reference = |finding: &Finding| match told.insert(finding.rule) {
        true => format!("; see {}", rules::reference(finding.rule)),
        false => String::new(),
    };
    let mut all: Vec<String> = findings.iter().rev().map(reference).collect();
    all.reverse();
    all
}

/// The answer of AWS, or a sentence.
fn told<T>(answered: Result<Result<T, AwsError>, tokio::time::error::Elapsed>) -> Result<T, String> {
    match answered {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("no answer in time; AWS is slow, or throttles our calls".to_owned()),
    }
}

/// An ARN for logs: whole if it is one, since people look for it, and cut like any other text of a user's if not.
fn told_arn(text: &str) -> Cow<'_, str> {
    match TargetGroupArn::parse(text) {
        Ok(_) => Cow::Borrowed(text),
        Err(_) => excerpt(text),
    }
}
