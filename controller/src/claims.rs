//! What is remembered of security groups and of what bindings want there. [`crate::security`] works on it.

use crate::group::{Known, State};
use crate::index::Key;
use crate::network::Claim;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex};
use tgb_aws::values::{NetworkInterface, SecurityGroup};
use tokio::sync::OnceCell;
use tokio::task::AbortHandle;
use tokio::time::Instant;

/// What is known of security groups.
#[derive(Default)]
pub(crate) struct SecurityGroups {
    pub(crate) claims: Mutex<BTreeMap<Key, Claim>>,
    pub(crate) groups: Mutex<BTreeMap<String, Arc<Group>>>,
    /// By instance, interface or address.
    pub(crate) interfaces: Mutex<HashMap<String, (Instant, Vec<NetworkInterface>)>>,
    pub(crate) tags: Mutex<HashMap<String, (Instant, SecurityGroup)>>,
    /// Set when the search at start has ended.
    pub(crate) searched: OnceCell<()>,
}

/// One group's writer.
#[derive(Default)]
pub(crate) struct Group {
    /// Held while writing.
    pub(crate) known: tokio::sync::Mutex<Known>,
    pub(crate) asked: AtomicU64,
    pub(crate) done: AtomicU64,
    pub(crate) failures: AtomicU32,
    pub(crate) state: Mutex<Option<State>>,
    /// The next look at it.
    pub(crate) later: Mutex<Option<AbortHandle>>,
}
