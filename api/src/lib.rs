//! `TargetGroupBinding`: its versions, their conversion, defaulting and rules.
//!
//! Everything here is a function of values: no clock, no network, no async. The webhook and the controller read
//! objects through the same types and hold them against the same rules, so what admission admits is what the
//! controller parses.
//!
//! - [`v1`]: the hub version as types; v1beta1 and v1alpha1 are only ever seen as JSON, by [`convert`].
//! - [`arn`], [`target_group`], [`service`]: the values that bindings refer to.
//! - [`crd`]: the CustomResourceDefinition with all versions.
//! - [`convert`]: the conversion between versions, on JSON.
//! - [`json`]: JSON as values, with every number as it is written.
//! - [`defaulting`], [`rules`]: what admission fills in, refuses and warns of.
//! - [`objects`]: Kubernetes' own objects, as far as they are read.
//! - [`options`]: annotations of ours on a binding.
//! - [`schema`]: objects held against the CustomResourceDefinition.
//! - [`review`]: what the API server asks of the webhook.
//! - [`text`]: texts of users in messages, and the forms of names.
//! - [`names`]: names that are shared with the AWS Load Balancer Controller and must stay.

pub mod arn;
pub mod convert;
pub mod crd;
pub mod defaulting;
#[cfg(test)]
mod fuzz;
pub mod json;
pub mod names;
pub mod objects;
pub mod options;
pub mod review;
pub mod rules;
mod scan;
pub mod schema;
pub mod service;
pub mod target_group;
pub mod text;
pub mod v1;
