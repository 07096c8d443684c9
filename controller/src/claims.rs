//! What is remembered of security groups and of what bindings want there. [`crate::security`] works on it.

use crate::index::Key;
use crate::network::Claim;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use tgb_aws::AwsError;
use tgb_aws::values::{NetworkInterface, Permission, SecurityGroup};
use tokio::time::Instant;

/// What is known of security groups.
#[derive(Default)]
pub(crate) struct SecurityGroups {
    pub(crate) claims: Mutex<BTreeMap<Key, Claim>>,
    pub(crate) groups: Mutex<BTreeMap<String, Arc<Group>>>,
    pub(crate) interfaces: Mutex<HashMap<String, (Instant, Vec<NetworkInterface>)>>,
    pub(crate) tags: Mutex<HashMap<String, (Instant, SecurityGroup)>>,
}

/// One group's writer.
#[derive(Default)]
pub(crate) struct Group {
    pub(crate) writing: tokio::sync::Mutex<()>,
    pub(crate) asked: AtomicU64,
    pub(crate) done: AtomicU64,
    pub(crate) state: Mutex<Option<State>>,
}

/// How a group stood after the last pass.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct State {
    pub(crate) rules: BTreeSet<Permission>,
    pub(crate) failed: BTreeMap<Permission, AwsError>,
    pub(crate) error: Option<AwsError>,
}
