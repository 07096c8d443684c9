//! The memory of security groups and of what bindings claim there. [`crate::security`] works on it.

use crate::group::State;
use crate::index::Key;
use crate::lookup::Lookups;
use crate::network::Claim;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tgb_aws::values::{NetworkInterface, Permission};
use tokio::sync::watch;

/// Network interfaces that have an instance, an id or an address in common.
pub(crate) type Interfaces = Arc<[NetworkInterface]>;

/// The claims, the writers of groups, and the look-ups.
pub(crate) struct SecurityGroups {
    pub(crate) claims: Mutex<BTreeMap<Key, Held>>,
    pub(crate) groups: Mutex<BTreeMap<String, Arc<Group>>>,
    /// By the id of the interface.
    pub(crate) enis: Lookups<String, Interfaces>,
    /// By the id of the instance.
    pub(crate) instances: Lookups<String, Interfaces>,
    /// By VPC and address.
    pub(crate) addresses: Lookups<(String, IpAddr), Interfaces>,
    /// By the id of the security group.
    pub(crate) tags: Lookups<String, Arc<BTreeMap<String, String>>>,
    /// Becomes true when the search at start has ended.
    pub(crate) searched: watch::Sender<bool>,
}

impl SecurityGroups {
    pub(crate) fn new(remembered: Duration) -> Self {
        Self {
            claims: Mutex::default(),
            groups: Mutex::default(),
            enis: Lookups::new(remembered),
            instances: Lookups::new(remembered),
            addresses: Lookups::new(remembered),
            tags: Lookups::new(remembered),
            searched: watch::Sender::new(false),
        }
    }
}

/// A binding's claim.
#[derive(Default)]
pub(crate) struct Held {
    pub(crate) claim: Arc<Claim>,
    /// Groups that it claimed something in before, and no longer does.
    pub(crate) left: BTreeSet<String>,
    /// The claim at the time its clean-up began.
    pub(crate) dropped: Option<Arc<Claim>>,
}

/// One security group, as its writer tells of it.
#[derive(Default)]
pub(crate) struct Group {
    pub(crate) asked: watch::Sender<Asked>,
    pub(crate) progress: watch::Sender<Progress>,
}

/// The number of times that a writer was asked for a pass.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) times: u64,
    /// The number of those for a pass that reads the group afresh.
    pub(crate) afresh: u64,
}

/// The progress of a writer.
#[derive(Debug, Clone, Default)]
pub(crate) struct Progress {
    /// The [`Asked::times`] that are done.
    pub(crate) done: u64,
    /// The end of the last pass.
    pub(crate) state: Option<Arc<State>>,
    /// The rules of ours that were last seen there.
    pub(crate) ours: BTreeSet<Permission>,
}
