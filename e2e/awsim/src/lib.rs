//! An emulator of the ELBv2, EC2 and STS actions that binding target groups needs, with AWS's semantics: target states
//! over time, zones, limits, throttling, error codes and texts, and with faults on demand. See `docs/awsim.md`.
//!
//! One server has any number of accounts and regions, apart from each other. An access key that begins with twelve
//! digits (or has them after `AKIA`) belongs to that account; keys from `AssumeRole` belong to the role's account; all
//! others to [`DEFAULT_ACCOUNT`].
//!
//! ```
//! use awsim::{Cluster, Effect, Fault, Node, Options, Server};
//!
//! let aws = Server::start(Options::fast())?;
//! let (account, region) = ("111122223333", "us-west-2");
//! aws.seed(account, region, |aws| {
//!     aws.seed_cluster(&Cluster {
//!         nodes: vec![Node {
//!             instance: "i-00000000000000001".to_owned(),
//!             ip: Some([192, 168, 0, 10].into()),
//!             pod_prefixes: vec!["10.244.0.0/24".parse().unwrap()],
//!             ..Node::default()
//!         }],
//!         ..Cluster::default()
//!     });
//! });
//! // the next RegisterTargets of this account is done, but nobody hears of it
//! aws.fault(Fault::new(Effect::LostResponse).account(account).action("RegisterTargets").times(1));
//! // AWS_ENDPOINT_URL=…, AWS_ACCESS_KEY_ID=111122223333, AWS_SECRET_ACCESS_KEY=x, AWS_REGION=us-west-2
//! println!("{}", aws.endpoint());
//! assert!(aws.journal_of(account).is_empty());
//! # Ok::<(), std::io::Error>(())
//! ```

mod ec2;
mod elb;
mod server;
mod state;
#[cfg(test)]
mod tests;
mod wire;
mod world;

pub use ec2::eni_of;
pub use elb::TargetState;
pub use server::{Server, TargetRow};
pub use state::{
    Aws, Cluster, Eni, Forwards, Health, HealthCheck, Instance, InstanceState, Listener, ListenerRule,
    LoadBalancer, Node, Probe, Quotas, Rule, SecurityGroup, Settled, Source, Subnet, Tags, Target,
    TargetGroup, TargetId, Timing, Vpc, partition,
};
pub use wire::{AwsError, Params, Service, Xml};
pub use world::{Call, DEFAULT_ACCOUNT, Effect, Fault, Options, Role};
