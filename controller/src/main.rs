//! `tgb-controller`: keeps target groups and security groups as TargetGroupBindings say.
//!
//! Watches ([`run`]) feed an [`index`]; every binding has a worker ([`reconcile`]) that asks pure functions what is wanted
//! ([`desired`]), whose it is ([`ownership`]), what to do about it ([`plan`]) and when to look again ([`polling`]), has it
//! done ([`apply`], [`gates`], [`security`]), remembers what AWS said ([`observed`]) and reports ([`status`], [`writes`],
//! [`events`]). All of them share [`context`].

mod apply;
mod batches;
mod claims;
mod context;
mod desired;
mod error;
mod events;
mod gates;
mod group;

mod http;
mod index;
mod kept;
mod lease;
mod lookup;
mod metrics;
mod network;
mod observed;
mod ownership;
mod plan;
mod polling;
mod reason;
mod reconcile;
mod run;
mod security;
mod status;
mod storage;
mod tracking;
mod writes;
mod zones;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory as _, Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use tgb_process::{Logging, duration};

const EXIT_CODES: &str = "Exit codes: 0 done, or a clean stop after SIGTERM; 1 something is missing at start, the lease is lost, or a command \
    failed, and stderr says which; 2 wrong flags.";

/// Beside the main one, and the one that keeps the lease. Nothing takes long: lists come in pages of 50 objects, read in some
/// milliseconds.
const THREADS: usize = 1;

/// Keeps target groups and security groups as TargetGroupBindings say.
///
/// Every flag can be given by its environment variable as well.
#[derive(Debug, Parser)]
#[command(name = "tgb-controller", version, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the controller.
    Run(Box<Flags>),
    /// Write every stored object in the CRD's storage version, then forget the other versions. Safe to repeat.
    MigrateStorage {
        /// Count, and change nothing.
        #[arg(long, env = "TGB_DRY_RUN")]
        dry_run: bool,
        #[command(flatten)]
        cluster: Cluster,
    },
    /// Take our finalizers off without deregistering anything, for an uninstall that keeps traffic.
    Release {
        /// All bindings; there is no other choice, it is asked for so that nobody does it by accident.
        #[arg(long, env = "TGB_ALL", required = true)]
        all: bool,
        #[command(flatten)]
        own: Own,
        #[command(flatten)]
        cluster: Cluster,
    },
    /// Leave a CRD that needs no converter: one version stored and served, conversion None.
    #[command(group = clap::ArgGroup::new("asked").required(true).args(["yes", "release"]))]
    PrepareUninstall {
        /// Do it now; it is asked for so that nobody does it by accident.
        #[arg(long, env = "TGB_YES")]
        yes: bool,
        /// Do it if this Helm release, NAMESPACE/NAME, has installed the CRD; for the hook of its uninstall.
        #[arg(long, env = "TGB_RELEASE")]
        release: Option<storage::Release>,
        /// The version that stays.
        #[arg(long, env = "TGB_KEEP_VERSION", default_value = "v1")]
        keep_version: String,
        /// Go on while bindings of this installation still have our finalizer.
        #[arg(long, env = "TGB_FORCE")]
        force: bool,
        /// This installation runs no controller: finalizers are another one's and do not count.
        #[arg(long, env = "TGB_NO_CONTROLLER")]
        no_controller: bool,
        #[command(flatten)]
        own: Own,
        #[command(flatten)]
        cluster: Cluster,
    },
}

/// The bindings that are this installation's, as the same flags of `run` say.
#[derive(Debug, Clone, Args)]
struct Own {
    /// Bindings of these namespaces only, as with `run`; none given: of all.
    #[arg(long, env = "TGB_WATCH_NAMESPACES", value_delimiter = ',')]
    watch_namespaces: Vec<String>,
    /// Also the bindings that LBC made for its own Ingresses, Services and Gateways, as with `run`.
    #[arg(long, env = "TGB_MANAGE_LBC_BINDINGS")]
    manage_lbc_bindings: bool,
}

impl Own {
    fn managed(self, nothing: bool) -> storage::Managed {
        let namespaces = self.watch_namespaces.into_iter().filter(|name| !name.is_empty()).collect();
        storage::Managed { namespaces, lbc_bindings: self.manage_lbc_bindings, nothing }
    }
}

/// How the commands that only touch the cluster reach it, and how they log.
#[derive(Debug, Clone, Args)]
struct Cluster {
    /// Kubeconfig; otherwise from $KUBECONFIG or the pod's service account.
    #[arg(long, env = "TGB_KUBECONFIG")]
    kubeconfig: Option<PathBuf>,
    #[command(flatten)]
    logging: Logging,
}

/// Flags of `run`; each also by environment variable.
#[derive(Debug, Clone, Args)]
struct Flags {
    /// Name of the cluster: in rule descriptions and tags, and in session names.
    #[arg(long, env = "TGB_CLUSTER_NAME")]
    cluster_name: String,
    /// Region; otherwise from the environment, the profile or the instance metadata service.
    #[arg(long, env = "TGB_AWS_REGION")]
    aws_region: Option<String>,
    /// VPC of the cluster.
    #[arg(long, env = "TGB_AWS_VPC_ID")]
    aws_vpc_id: Option<String>,
    /// Kubeconfig; otherwise from $KUBECONFIG or the pod's service account.
    #[arg(long, env = "TGB_KUBECONFIG")]
    kubeconfig: Option<PathBuf>,
    /// Look at these namespaces only; needs --rule-owner.
    #[arg(long, env = "TGB_WATCH_NAMESPACES", value_delimiter = ',', requires = "rule_owner")]
    watch_namespaces: Vec<String>,
    /// Marks the security group rules of this installation beside others in the same cluster.
    #[arg(long, env = "TGB_RULE_OWNER")]
    rule_owner: Option<String>,
    /// Treat security group rules with exactly LBC's description as ours.
    #[arg(long, env = "TGB_ADOPT_UNMARKED_RULES")]
    adopt_unmarked_rules: bool,
    /// More tags (KEY or KEY=VALUE) of the security group that gets the rules where an interface has several.
    #[arg(long, env = "TGB_SECURITY_GROUP_TAGS", value_delimiter = ',')]
    security_group_tags: Vec<String>,
    /// Roles that `assumeRole` may name, `*` matching any characters; none given: no role may be assumed.
    #[arg(long, env = "TGB_ASSUME_ROLE_ALLOW", value_delimiter = ',')]
    assume_role_allow: Vec<String>,
    /// Tags (KEY or KEY=VALUE) that every target group must carry.
    #[arg(long, env = "TGB_REQUIRE_TARGET_GROUP_TAG", value_delimiter = ',')]
    require_target_group_tag: Vec<String>,
    /// Key of the target group tag that lists the namespaces which may bind it.
    #[arg(long, env = "TGB_NAMESPACE_BINDING_TAG")]
    namespace_binding_tag: Option<String>,
    /// What happens when a security group cannot hold all rules.
    #[arg(long, env = "TGB_RULE_OVERFLOW", default_value = "fail")]
    rule_overflow: group::RuleOverflow,
    /// A clean-up that has failed for so long is given up; 0: never.
    #[arg(long, env = "TGB_CLEANUP_DEADLINE", default_value = "0s", value_parser = duration)]
    cleanup_deadline: Duration,
    /// Targets that are not this cluster's and were registered before a binding came go after so long; 0: never, unless the
    /// binding's annotation elbv2.k8s.aws/adopt-targets says so.
    #[arg(long, env = "TGB_FOREIGN_TARGETS_GRACE", default_value = "0s", value_parser = duration)]
    foreign_targets_grace: Duration,
    /// Also manage the bindings that LBC made for its own Ingresses, Services and Gateways.
    #[arg(long, env = "TGB_MANAGE_LBC_BINDINGS")]
    manage_lbc_bindings: bool,
    #[command(flatten)]
    logging: Logging,
    /// Address of /livez, /readyz and /metrics.
    #[arg(long, env = "TGB_HTTP_LISTEN", default_value = ":8080")]
    http_listen: String,
    /// Namespace of the leader's lease; the pod's own by default.
    #[arg(long, env = "TGB_LEASE_NAMESPACE")]
    lease_namespace: Option<String>,
    /// Name of the leader's lease.
    #[arg(long, env = "TGB_LEASE_NAME", default_value = "tgb-controller")]
    lease_name: String,
    #[command(flatten)]
    lease: lease::Periods,
    /// Compute and show plans, write nothing to AWS.
    #[arg(long, env = "TGB_OBSERVE")]
    observe: bool,
    /// If no endpoint or node qualifies, those of unknown state do.
    #[arg(long, env = "TGB_ENDPOINTS_FAIL_OPEN", num_args = 0..=1, default_value_t = true, default_missing_value = "true", action = clap::ArgAction::Set)]
    endpoints_fail_open: bool,
    /// Register endpoints without a pod, too: whoever may write EndpointSlices can then register any address.
    #[arg(long, env = "TGB_ENDPOINTS_WITHOUT_PODS")]
    endpoints_without_pods: bool,
    /// Where the last targets stay while pods run but none is ready.
    #[arg(long, env = "TGB_KEEP_LAST_TARGETS", default_value = "instance")]
    keep_last_targets: context::KeepLast,
    /// How long targets that run outlive their Service or port.
    #[arg(long, env = "TGB_MISSING_BACKEND_GRACE", default_value = "30s", value_parser = duration)]
    missing_backend_grace: Duration,
    /// How long a healthy target that runs waits for a healthy successor.
    #[arg(long, env = "TGB_SWAP_GRACE", default_value = "5m", value_parser = duration)]
    swap_grace: Duration,
    /// Register at most this many targets of a binding. Those that wait for their successors, and in a Shared group those
    /// of others, are not counted.
    #[arg(long, env = "TGB_MAX_TARGETS_PER_TARGET_GROUP")]
    max_targets_per_target_group: Option<usize>,
    /// How often target health is read.
    #[arg(long, env = "TGB_HEALTH_POLL", default_value = "60s", value_parser = duration)]
    health_poll: Duration,
    /// Most reads of target health per second, over all target groups.
    #[arg(long, env = "TGB_POLL_RATE", default_value_t = 2.0)]
    poll_rate: f64,
    /// Our own rate limits of AWS calls as NAME=BURST/RATE, RATE per second. Names and defaults: elb=36/9,
    /// elb-describe=30/8, elb-targets=20/4, ec2-describe=50/10, ec2-change=40/5, sts=50/10.
    #[arg(long, env = "TGB_AWS_LIMIT", value_delimiter = ',')]
    aws_limit: Vec<String>,
    /// The period after which everything is compared again, as far as --poll-rate allows.
    #[arg(long, env = "TGB_RESYNC", default_value = "10m", value_parser = duration)]
    resync: Duration,
    /// After how long a pod's readiness gate opens whose binding does not exist.
    #[arg(long, env = "TGB_ORPHANED_GATE_GRACE", default_value = "60s", value_parser = duration)]
    orphaned_gate_grace: Duration,
}

impl Flags {
    /// What is wrong with flags that only a look at several of them, or into one, tells.
    fn check(&self) -> Result<(), String> {
        self.limits().and(self.lease.check())
    }

    fn limits(&self) -> Result<tgb_aws::Limits, String> {
        let mut limits = tgb_aws::Limits::default();
        for text in self.aws_limit.iter().filter(|text| !text.is_empty()) {
            limits.set(text).map_err(|error| format!("--aws-limit {error}"))?;
        }
        Ok(limits)
    }

    fn rules(&self) -> tgb_api::rules::Settings {
        tgb_api::rules::Settings::of_tenants(
            &self.assume_role_allow,
            &self.require_target_group_tag,
            self.namespace_binding_tag.as_deref(),
        )
    }

    fn settings(&self) -> context::Settings {
        context::Settings {
            observe: self.observe,
            switches: desired::Switches {
                endpoints_fail_open: self.endpoints_fail_open,
                endpoints_without_pods: self.endpoints_without_pods,
            },
            keep_last: self.keep_last_targets,
            missing_backend_grace: self.missing_backend_grace,
            swap_grace: self.swap_grace,
            max_targets: self.max_targets_per_target_group,
            health_poll: self.health_poll,
            poll_rate: self.poll_rate.max(0.01),
            resync: self.resync,
            rules: self.rules(),
            cleanup_deadline: Some(self.cleanup_deadline).filter(|deadline| !deadline.is_zero()),
            foreign_targets_grace: Some(self.foreign_targets_grace).filter(|grace| !grace.is_zero()),
            rule_overflow: self.rule_overflow,
            cluster_name: self.cluster_name.clone(),
            rule_owner: self.rule_owner.clone(),
            adopt_unmarked_rules: self.adopt_unmarked_rules,
            security_group_tags: std::iter::once((
                format!("kubernetes.io/cluster/{}", self.cluster_name),
                None,
            ))
            .chain(self.security_group_tags.iter().map(|tag| match tag.split_once('=') {
                Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                None => (tag.clone(), None),
            }))
            .collect(),
            watches_some: !self.watch_namespaces.is_empty(),
            manage_lbc_bindings: self.manage_lbc_bindings,
            orphaned_gate_grace: self.orphaned_gate_grace,
        }
    }
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    if let Command::Run(flags) = &command
        && let Err(message) = flags.check()
    {
        Cli::command().error(ErrorKind::ValueValidation, message).exit();
    }
    let logging = match &command {
        Command::Run(flags) => &flags.logging,
        Command::MigrateStorage { cluster, .. }
        | Command::Release { cluster, .. }
        | Command::PrepareUninstall { cluster, .. } => &cluster.logging,
    }
    .clone();
    tgb_process::main("tgb-controller", THREADS, &logging, execute(command))
}

async fn execute(command: Command) -> Result<(), String> {
    match command {
        Command::Run(flags) => run::run(*flags).await,
        Command::MigrateStorage { dry_run, cluster } => {
            storage::migrate(&tgb_process::client(cluster.kubeconfig.as_deref()).await?, dry_run)
                .await
                .map(drop)
        }
        Command::Release { all: _, own, cluster } => {
            let client = tgb_process::client(cluster.kubeconfig.as_deref()).await?;
            storage::release(&client, &own.managed(false)).await.map(drop)
        }
        Command::PrepareUninstall { yes: _, release, keep_version, force, no_controller, own, cluster } => {
            let client = tgb_process::client(cluster.kubeconfig.as_deref()).await?;
            let managed = own.managed(no_controller);
            let uninstall = storage::Uninstall { keep: keep_version, force, managed, release };
            storage::prepare_uninstall(&client, &uninstall).await
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flag_has_a_sentence_and_an_environment_variable() {
        assert_eq!(tgb_process::undocumented_flags(&Cli::command()), Vec::<String>::new());
    }
}
