//! The closed sets of words for machines: types of conditions, their reasons, and reasons of events. Conditions, events,
//! metric labels and logs use the same ones; `docs/conditions.md` explains each to people.

/// An enum whose members are written as they are called.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$member_doc:meta])* $member:ident),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub(crate) enum $name {
            $($(#[$member_doc])* $member),*
        }

        impl $name {
            /// Every member.
            #[cfg(test)]
            pub(crate) const ALL: &'static [Self] = &[$(Self::$member),*];

            /// The word.
            pub(crate) const fn as_str(self) -> &'static str {
                match self { $(Self::$member => stringify!($member)),* }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

words! {
    /// The type of a condition.
    Kind {
        /// The target group exists, and the binding may use it.
        TargetGroupResolved,
        /// The Service has the port.
        BackendResolved,
        /// AWS has the targets that the cluster wants there.
        TargetsRegistered,
        /// The security groups admit what `spec.networking` asks for.
        NetworkingReady,
        /// All of the above.
        Ready,
        /// Only a person can help; absent otherwise.
        Stalled,
        /// The binding is being deleted, and what it did cannot be undone yet; absent otherwise.
        CleanupFailed,
    }
}

words! {
    /// The reason of a condition.
    Reason {
        // ---- TargetGroupResolved ----
        TargetGroupNotFound,
        TargetTypeMismatch,
        InUseByAnotherBinding,
        AccessDenied,
        AwsUnavailable,
        NotAllowed,
        InvalidSpec,
        // ---- BackendResolved ----
        ServiceNotFound,
        PortNotFound,
        NodePortMissing,
        UnsupportedServiceType,
        NoMatchingPods,
        NoMatchingPort,
        NoMatchingNodes,
        NoEndpoints,
        PodsUnknown,
        // ---- TargetsRegistered ----
        RegistrationFailed,
        TargetsRejected,
        TargetLimitReached,
        BackendUnready,
        TargetsRemovedByOthers,
        ForeignTargets,
        Paused,
        // ---- NetworkingReady ----
        SecurityGroupAmbiguous,
        SecurityGroupNotFound,
        RuleLimitExceeded,
        RulesRejected,
        // ---- when True ----
        Resolved,
        Registered,
        Authorized,
        NotManaged,
        Reconciled,
        // ---- when Unknown ----
        Pending,
        // ---- of a binding that is being deleted ----
        CleanupFailed,
    }
}

words! {
    /// The reason of an event.
    EventReason {
        Registered,
        Deregistered,
        BackendNotFound,
        TargetsRejected,
        ForeignTargets,
        TargetsRemovedByOthers,
        NetworkingFailed,
        RulesRetained,
        CleanupFailed,
        /// The binding is gone, and something that it did is not undone.
        CleanupIncomplete,
        ReconcileFailed,
        Paused,
        ReadinessGateMissing,
    }
}

impl EventReason {
    /// The event that tells of a condition that is not true.
    pub(crate) const fn of(kind: Kind, reason: Reason) -> Self {
        match (kind, reason) {
            (_, Reason::TargetsRejected) => Self::TargetsRejected,
            (_, Reason::ForeignTargets) => Self::ForeignTargets,
            (_, Reason::TargetsRemovedByOthers) => Self::TargetsRemovedByOthers,
            (_, Reason::Paused) => Self::Paused,
            (_, Reason::CleanupFailed) => Self::CleanupFailed,
            (Kind::BackendResolved, _) => Self::BackendNotFound,
            (Kind::NetworkingReady, _) => Self::NetworkingFailed,
            _ => Self::ReconcileFailed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What users look words up in.
    const PAGE: &str = include_str!("../../docs/conditions.md");

    #[test]
    fn every_word_is_explained() {
        let words = Kind::ALL.iter().map(|word| word.as_str());
        let words = words.chain(Reason::ALL.iter().map(|word| word.as_str()));
        for word in words.chain(EventReason::ALL.iter().map(|word| word.as_str())) {
            assert!(PAGE.contains(&format!("| `{word}`")), "docs/conditions.md does not explain {word}");
        }
    }
}
