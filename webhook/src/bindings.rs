//! The two reviews of bindings: both complete the object and hold it against every rule; the mutating one answers with
//! the patch as well.

use crate::admission::{self, Answer, Request};
use crate::lookup::{Cluster, TargetGroups};
use crate::metrics::Metrics;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tgb_api::arn::TargetGroupArn;
use tgb_api::defaulting;
use tgb_api::names;
use tgb_api::rules::{self, Context, Finding, Lookup, Operation, Other, Severity};
use tgb_api::service::Service;
use tgb_api::target_group::TargetGroup;
use tgb_api::v1::{Sharing, TargetGroupBinding};
use tgb_aws::{AwsError, TargetGroupQuery};
use tokio::time::Instant;

/// What the reviews work with.
pub(crate) struct Bindings {
    /// The cluster.
    pub(crate) cluster: Cluster,
    /// AWS; absent where no region is known.
    pub(crate) target_groups: Option<TargetGroups>,
    /// What the operator decided, with what AWS says of us.
    pub(crate) settings: tokio::sync::watch::Receiver<Arc<rules::Settings>>,
    /// `--aws-unavailable=admit`.
    pub(crate) admit_without_aws: bool,
    /// Where findings are counted.
    pub(crate) metrics: Arc<Metrics>,
}

/// What AWS said, or why it said nothing.
#[derive(Default)]
struct FromAws {
    group: Lookup<TargetGroup>,
    named: Lookup<TargetGroup>,
    tags: Option<Arc<BTreeMap<String, String>>>,
    registered: Option<usize>,
    failure: Option<String>,
}

fn borrow<T>(lookup: &Lookup<T>) -> Lookup<&T> {
    match lookup {
        Lookup::Unknown => Lookup::Unknown,
        Lookup::Missing => Lookup::Missing,
        Lookup::Found(value) => Lookup::Found(value),
    }
}

fn looked_up<T>(found: Option<T>) -> Lookup<T> {
    found.map_or(Lookup::Missing, Lookup::Found)
}

impl Bindings {
    /// Answers a review; `mutating` says which one. `within` is the time that is left for it.
    ///
    /// # Errors
    /// A sentence for HTTP 500.
    pub(crate) async fn review(
        &self,
        request: &Request,
        mutating: bool,
        within: Duration,
    ) -> Result<Answer, String> {
        let deadline = Instant::now() + within;
        let operation = match request.operation() {
            "CREATE" => Operation::Create,
            "UPDATE" => Operation::Update,
            _ => return Ok(Answer::default()),
        };
        let Some(sent) = request.object() else { return Ok(Answer::default()) };
        let Ok(mut new) = parse(sent, request.namespace()) else {
            // Of a wrong type somewhere: the schema, which comes after the mutating review, says where.
            return Ok(Answer::default());
        };
        let old = request.old_object().and_then(|old| parse(old, request.namespace()).ok());
        if new.is_terminating()
            || (operation == Operation::Update && old.as_ref().is_some_and(|old| old.spec == new.spec))
        {
            return Ok(Answer::default());
        }
        let settings = Arc::clone(&self.settings.borrow());

        let mut completed = sent.clone();
        let mut additions = Vec::new();
        if mutating && let Some(old) = &old {
            additions = defaulting::from_old(&new, old);
            defaulting::apply(&mut completed, &additions);
            new = parse(&completed, request.namespace())?;
        }

        let aws = self.ask_aws(operation, &new, old.as_ref(), &settings, deadline).await;
        let name = new.spec.service_ref.name.clone();
        let namespace = new.namespace().to_owned();
        let mut service = match self.cluster.cached_service(&namespace, &name) {
            Some(found) if !name.is_empty() => Lookup::Found(found),
            _ => Lookup::Unknown,
        };
        let mut live = false;
        if matches!(service, Lookup::Unknown) && !name.is_empty() {
            service = self.live(&namespace, &name, deadline).await;
            live = true;
        }
        let needs_label = new.name().len() > 63 && operation == Operation::Create;
        let injects = if needs_label { self.cluster.injects(&namespace).await } else { None };

        let mut result = self.judge(
            operation,
            sent,
            &completed,
            old.as_ref(),
            &aws,
            &service,
            injects,
            &settings,
            mutating,
        )?;
        let rests_on_service =
            |finding: &Finding| finding.rule.starts_with("TGB2") || finding.rule == "TGB117";
        if !live && result.findings.iter().any(rests_on_service) {
            service = self.live(&namespace, &name, deadline).await;
            result = self.judge(
                operation,
                sent,
                &completed,
                old.as_ref(),
                &aws,
                &service,
                injects,
                &settings,
                mutating,
            )?;
        }
        additions.extend(result.additions);
        let patch = if mutating { defaulting::patch(sent, &additions) } else { Vec::new() };
        Ok(self.answer(request, result.findings, result.notes, patch))
    }

    async fn live(&self, namespace: &str, name: &str, deadline: Instant) -> Lookup<Service> {
        match tokio::time::timeout_at(deadline, self.cluster.live_service(namespace, name)).await {
            Ok(Ok(found)) => looked_up(found),
            Ok(Err(error)) => {
                tracing::warn!(%error, namespace, name, "a Service can't be read");
                Lookup::Unknown
            }
            Err(_) => Lookup::Unknown,
        }
    }

    async fn ask_aws(
        &self,
        operation: Operation,
        new: &TargetGroupBinding,
        old: Option<&TargetGroupBinding>,
        settings: &rules::Settings,
        deadline: Instant,
    ) -> FromAws {
        let mut out = FromAws::default();
        let group = &new.spec.target_group;
        let role = group.role();
        // What the rules refuse without AWS is not asked for, and a role that may not be assumed is not assumed.
        if role.is_some_and(|role| !settings.may_assume(role.role_arn)) {
            return out;
        }
        if let Some(arn) = group.arn() {
            let Ok(arn) = TargetGroupArn::parse(arn) else { return out };
            let elsewhere = settings.region.as_deref().is_some_and(|region| region != arn.region())
                || settings.partition.as_deref().is_some_and(|partition| partition != arn.partition())
                || (role.is_none()
                    && settings.account.as_deref().is_some_and(|account| account != arn.account()));
            if elsewhere {
                return out;
            }
        } else if group.name().is_none() {
            return out;
        }
        let same =
            old.is_some_and(|old| old.spec.target_group == *group) && !defaulting::needs_target_group(group);
        if same
            && operation == Operation::Update
            && old.is_some_and(|old| old.spec.service_ref == new.spec.service_ref)
        {
            return out;
        }
        let Some(aws) = &self.target_groups else {
            out.failure = Some("no AWS region is known (--aws-region)".to_owned());
            return out;
        };
        let asked = async {
            let query = match group.arn() {
                Some(arn) => TargetGroupQuery::Arn(arn),
                None => TargetGroupQuery::Name(group.name().unwrap_or_default()),
            };
            out.group = looked_up(aws.describe(role, query).await?);
            let Lookup::Found(found) = &out.group else { return Ok(()) };
            let arn = found.arn.as_str();
            if let (Some(_), Some(name)) = (group.arn(), group.name()) {
                // Names are unique per account and region, and part of the ARN.
                out.named =
                    if name == found.arn.name() { Lookup::Found(found.clone()) } else { Lookup::Unknown };
            }
            if settings.wants_tags() {
                out.tags = aws.tags(role, arn).await?;
            }
            let was_shared = old.is_some_and(|old| old.spec.target_group.sharing() == Sharing::Shared);
            if group.sharing() == Sharing::Exclusive && (operation == Operation::Create || was_shared) {
                out.registered = aws.registered(role, arn).await?;
            }
            Ok::<(), AwsError>(())
        };
        let failure = match tokio::time::timeout_at(deadline, asked).await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some("no answer in time".to_owned()),
        };
        out.failure = failure;
        out
    }

    #[expect(clippy::too_many_arguments, reason = "one step of a review, called twice")]
    fn judge(
        &self,
        operation: Operation,
        sent: &Value,
        completed: &Value,
        old: Option<&TargetGroupBinding>,
        aws: &FromAws,
        service: &Lookup<Service>,
        injects: Option<bool>,
        settings: &rules::Settings,
        mutating: bool,
    ) -> Result<Judged, String> {
        let namespace = sent.pointer("/metadata/namespace").and_then(Value::as_str).unwrap_or_default();
        let mut new = parse(completed, namespace)?;
        let needed = defaulting::needs_target_group(&new.spec.target_group);
        let mut additions = Vec::new();
        if mutating {
            let group = borrow(&aws.group).found();
            additions = defaulting::from_lookups(&new, group, borrow(service).found());
            let mut object = completed.clone();
            defaulting::apply(&mut object, &additions);
            new = parse(&object, namespace)?;
        }
        let mut notes = Vec::new();
        let others: Option<Vec<Other>> = match new.spec.target_group.arn() {
            Some(arn) => self.cluster.others(arn, new.namespace(), new.name()),
            None => Some(Vec::new()),
        };
        if others.is_none() {
            notes.push(
                "TGB115 not checked: the list of bindings is not complete yet; the controller decides"
                    .to_owned(),
            );
        }
        let context = Context {
            service: borrow(service),
            target_group: borrow(&aws.group),
            named: borrow(&aws.named),
            tags: aws.tags.as_deref(),
            registered: aws.registered,
            others: others.as_deref(),
            injects,
        };
        let mut findings = rules::check(operation, &new, old, &context, settings);
        if let Some(reason) = &aws.failure {
            let path = if new.spec.target_group.arn().is_some() {
                "spec.targetGroup.arn"
            } else {
                "spec.targetGroup.name"
            };
            let unanswered = matches!(aws.group, Lookup::Unknown);
            let finding =
                rules::aws_unavailable(path, reason, needed && unanswered, self.admit_without_aws, settings);
            findings.extend(finding);
            findings.sort_by_key(|finding| finding.severity);
        }
        Ok(Judged { findings, additions, notes })
    }

    fn answer(
        &self,
        request: &Request,
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
        for finding in &warned {
            self.metrics.finding(finding.rule, "warned");
        }
        let mut warnings: Vec<String> = warned.iter().map(|finding| finding.in_version(version)).collect();
        warnings.extend(notes);
        if refused.is_empty() {
            return Answer { patch, warnings, refusal: None };
        }
        let lines: Vec<String> = refused.iter().map(|finding| finding.in_version(version)).collect();
        tracing::info!(
            namespace = request.namespace(),
            name = request.name(),
            findings = lines.join("; "),
            "refused a binding"
        );
        let refusal = if refused.iter().any(|finding| finding.kind == rules::Kind::Shape) {
            let fields = refused.iter().map(|finding| rules::path_in(version, &finding.path));
            let causes: Vec<(String, String)> = fields.zip(lines).collect();
            admission::invalid(names::GROUP, names::KIND, request.name(), &causes)
        } else {
            admission::forbidden(&lines)
        };
        Answer { patch: Vec::new(), warnings, refusal: Some(refusal) }
    }
}

struct Judged {
    findings: Vec<Finding>,
    additions: Vec<defaulting::Addition>,
    notes: Vec<String>,
}

fn parse(object: &Value, namespace: &str) -> Result<TargetGroupBinding, String> {
    let mut parsed: TargetGroupBinding = serde_json::from_value(object.clone()).map_err(|e| e.to_string())?;
    if parsed.metadata.namespace.is_none() {
        parsed.metadata.namespace = Some(namespace.to_owned());
    }
    Ok(parsed)
}
