//! Names that users, other controllers and stored objects rely on.

/// API group of the binding.
pub const GROUP: &str = "elbv2.k8s.aws";
/// Kind of the binding.
pub const KIND: &str = "TargetGroupBinding";
/// Plural, as in the URL.
pub const PLURAL: &str = "targetgroupbindings";
/// Name of the CustomResourceDefinition.
pub const CRD: &str = "targetgroupbindings.elbv2.k8s.aws";

/// Finalizer of a binding, the same as the AWS Load Balancer Controller's.
pub const FINALIZER: &str = "elbv2.k8s.aws/resources";
/// Prefix of the readiness-gate condition type; `/<binding name>` follows.
pub const READINESS_GATE_PREFIX: &str = "target-health.elbv2.k8s.aws";
/// Namespace label that switches readiness-gate injection on, with the value [`INJECT_ENABLED`].
pub const INJECT_LABEL: &str = "elbv2.k8s.aws/pod-readiness-gate-inject";
/// Namespace label that switches the injection of QUIC server ids on, with the value [`INJECT_ENABLED`].
pub const QUIC_INJECT_LABEL: &str = "elbv2.k8s.aws/quic-server-id-inject";
/// Value of [`INJECT_LABEL`] and [`QUIC_INJECT_LABEL`].
pub const INJECT_ENABLED: &str = "enabled";
/// Pod annotation that names the containers (comma separated) which get a QUIC server id.
pub const QUIC_CONTAINERS_ANNOTATION: &str =
    "service.beta.kubernetes.io/aws-load-balancer-quic-enabled-containers";
/// Environment variable of a container that holds its QUIC server id.
pub const QUIC_ENVIRONMENT_VARIABLE: &str = "AWS_LBC_QUIC_SERVER_ID";
/// Name prefix of the ConfigMap that tracks the targets of a Shared binding.
pub const TRACKING_CONFIG_MAP_PREFIX: &str = "aws-lbc-targets-";
/// Key in that ConfigMap.
pub const TRACKING_CONFIG_MAP_KEY: &str = "targets";
/// Annotation of that ConfigMap: the cluster whose controller wrote it.
pub const TRACKING_CLUSTER: &str = "elbv2.k8s.aws/cluster";
/// Annotation of that ConfigMap: the UID of the binding that it is of.
pub const TRACKING_BINDING_UID: &str = "elbv2.k8s.aws/binding-uid";
/// What the description of a security group rule of ours starts with.
pub const RULE_DESCRIPTION: &str = "elbv2.k8s.aws/targetGroupBinding=shared";
/// Label of a Service's endpoint slices.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// `"true"`: nothing is changed in AWS, status goes on. This one and those below are read by [`crate::options`].
pub const PAUSED: &str = "elbv2.k8s.aws/paused";
/// `retain`: deletion deregisters nothing and revokes nothing.
pub const ON_DELETE: &str = "elbv2.k8s.aws/on-delete";
/// `"true"`: targets that something else registered may be deregistered.
pub const ADOPT_TARGETS: &str = "elbv2.k8s.aws/adopt-targets";
/// `"true"`: the finalizer is dropped even though clean-up fails.
pub const RELEASE: &str = "elbv2.k8s.aws/release";
/// `warn` or `ignore`: what becomes of rule TGB206.
pub const NODE_PORT_MISMATCH: &str = "elbv2.k8s.aws/node-port-mismatch";
/// `keep` or `deregister`: what happens when no endpoint is ready although pods run.
pub const WHEN_NONE_READY: &str = "elbv2.k8s.aws/when-none-ready";

/// Whether it is a label of bindings that the AWS Load Balancer Controller made for itself.
pub fn is_of_lbc(label: &str) -> bool {
    ["ingress.k8s.aws/", "service.k8s.aws/", "gateway.k8s.aws/"]
        .iter()
        .any(|prefix| label.starts_with(prefix))
}

/// The readiness-gate condition type of a binding.
pub fn readiness_gate(binding: &str) -> String {
    format!("{READINESS_GATE_PREFIX}/{binding}")
}

/// The name of the ConfigMap that tracks the targets of a Shared binding.
pub fn tracking_config_map(binding: &str) -> String {
    format!("{TRACKING_CONFIG_MAP_PREFIX}{binding}")
}
