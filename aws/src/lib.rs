//! What tgb needs from AWS, as values, and the one adapter that speaks to it.
//!
//! - [`values`]: targets, security groups and their rules, network interfaces: plain data that the pure parts of the
//!   controller work on.
//! - [`Aws`]: the calls, each one request (or its pages) and no decision; the only place that names the AWS SDK.
//! - [`AwsError`]: what AWS answered, with a class that says what to do about it.
//! - [`Bounded`]: a map for what users name.
//! - [`Limits`]: our own budget of calls; [`Metrics`]: how calls fare.

mod bounded;
mod client;
mod ec2;
mod elb;
mod error;
#[cfg(test)]
mod fuzz;
mod joined;
mod limits;
mod metrics;
mod role;
pub mod values;

pub use bounded::Bounded;
pub use client::{Aws, Identity, Recoveries, Settings};
pub use elb::TargetGroupQuery;
pub use error::{AwsError, Class};
pub use limits::{CallClass, Limit, Limits};
pub use metrics::Metrics;
