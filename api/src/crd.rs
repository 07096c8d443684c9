//! The CustomResourceDefinition with all three versions.
//!
//! Rules that need only the object are CEL, the same in every version, and their messages begin with the rule's id. What
//! the AWS Load Balancer Controller's (LBC's) schema accepted stays editable: a rule on a single value is skipped by the
//! API server while the value stays (validation ratcheting), and [`kept_rule`] lets an object keep a fault that it had.
//! Lists don't correlate item by item, so `networking` is one unit. CEL's cost estimate needs lengths: the hard ones
//! ([`MOST_INGRESS`], [`MOST_PEERS`], [`MOST_PORTS`]) are far above [`ITEMS`], which holds for new objects.

use crate::names;
use crate::v1::FirstContact;
use serde_json::{Value, json};

/// A served version.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Version {
    /// The hub.
    #[default]
    V1,
    /// What LBC ships.
    V1Beta1,
    /// What LBC shipped first; deprecated.
    V1Alpha1,
}

impl Version {
    /// All versions, newest first.
    pub const ALL: [Version; 3] = [Version::V1, Version::V1Beta1, Version::V1Alpha1];

    /// As in a URL: `v1`.
    pub const fn name(self) -> &'static str {
        match self {
            Version::V1 => "v1",
            Version::V1Beta1 => "v1beta1",
            Version::V1Alpha1 => "v1alpha1",
        }
    }

    /// As in an object: `elbv2.k8s.aws/v1`.
    pub const fn api_version(self) -> &'static str {
        match self {
            Version::V1 => "elbv2.k8s.aws/v1",
            Version::V1Beta1 => "elbv2.k8s.aws/v1beta1",
            Version::V1Alpha1 => "elbv2.k8s.aws/v1alpha1",
        }
    }

    /// The version of an object's `apiVersion`; none if it is not served.
    pub fn of_api_version(api_version: &str) -> Option<Version> {
        Version::ALL.into_iter().find(|version| version.api_version() == api_version)
    }
}

/// The CustomResourceDefinition (apiextensions.k8s.io/v1) with `storage` as the version that is stored.
///
/// The conversion webhook's Service is a placeholder (`tgb-webhook` in `tgb-system`, no `caBundle`): whoever installs
/// the definition replaces `spec.conversion`.
pub fn crd(storage: Version) -> Value {
    let versions: Vec<Value> = Version::ALL.into_iter().map(|each| version(each, each == storage)).collect();
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": names::CRD},
        "spec": {
            "group": names::GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": names::KIND,
                "listKind": format!("{}List", names::KIND),
                "plural": names::PLURAL,
                "singular": "targetgroupbinding",
                "shortNames": ["tgb"],
            },
            "conversion": {
                "strategy": "Webhook",
                "webhook": {
                    "conversionReviewVersions": ["v1"],
                    "clientConfig": {
                        "service": {"namespace": "tgb-system", "name": "tgb-webhook", "port": 443, "path": "/convert"},
                    },
                },
            },
            "versions": versions,
        },
    })
}

fn version(version: Version, storage: bool) -> Value {
    let (spec, status) = match version {
        Version::V1 => (spec_v1(), status(Conditions::ByType)),
        Version::V1Beta1 | Version::V1Alpha1 => (spec_old(), status(Conditions::AsLbc)),
    };
    let mut root = object(
        "Binds a Service to an existing target group of Elastic Load Balancing.",
        json!({
            "apiVersion": text("Version of this object's schema."),
            "kind": text("TargetGroupBinding."),
            "metadata": {"type": "object"},
            "spec": spec,
            "status": status,
        }),
    );
    if version == Version::V1 {
        root = with(root, json!({"required": ["spec"]}));
    }
    let mut made = json!({
        "name": version.name(),
        "served": true,
        "storage": storage,
        "subresources": {"status": {}},
        "additionalPrinterColumns": columns(version),
        "schema": {"openAPIV3Schema": root},
    });
    if version == Version::V1Alpha1 {
        made = with(
            made,
            json!({
                "deprecated": true,
                "deprecationWarning":
                    "elbv2.k8s.aws/v1alpha1 TargetGroupBinding is deprecated; use elbv2.k8s.aws/v1",
            }),
        );
    }
    made
}

fn columns(version: Version) -> Value {
    let column = |name: &str, path: &str, priority: i32| {
        let kind = if name == "AGE" { "date" } else { "string" };
        let mut made = json!({"name": name, "type": kind, "jsonPath": path});
        if priority > 0 {
            made = with(made, json!({"priority": priority}));
        }
        made
    };
    let group = |v1: &'static str, old: &'static str| if version == Version::V1 { v1 } else { old };
    let target_type = group(".spec.targetGroup.targetType", ".spec.targetType");
    let arn = group(".spec.targetGroup.arn", ".spec.targetGroupARN");
    let name = group(".spec.targetGroup.name", ".spec.targetGroupName");
    let mut all = vec![
        column("SERVICE-NAME", ".spec.serviceRef.name", 0),
        column("SERVICE-PORT", ".spec.serviceRef.port", 0),
        column("TARGET-TYPE", target_type, 0),
    ];
    if version == Version::V1Alpha1 {
        all.extend([column("ARN", arn, 1), column("NAME", name, 2), column("AGE", AGE, 0)]);
    } else {
        all.extend([
            column("READY", r#".status.conditions[?(@.type=="Ready")].status"#, 0),
            column("TARGETS", ".status.targets.summary", 0),
            column("AGE", AGE, 0),
            column("ARN", arn, 1),
            column("NAME", name, 1),
            column("REASON", r#".status.conditions[?(@.type=="Ready")].reason"#, 1),
        ]);
    }
    Value::Array(all)
}

const AGE: &str = ".metadata.creationTimestamp";
const TARGET_TYPES: [&str; 2] = ["instance", "ip"];
const PROTOCOLS: [&str; 8] = ["HTTP", "HTTPS", "TCP", "TLS", "UDP", "TCP_UDP", "QUIC", "TCP_QUIC"];
const IP_ADDRESS_TYPES: [&str; 2] = ["ipv4", "ipv6"];

/// The most items of each list of a new object's `networking`.
const ITEMS: u32 = 50;
// What no object may exceed: more than one security group can ever hold.
const MOST_INGRESS: u32 = 100;
const MOST_PEERS: u32 = 500;
const MOST_PORTS: u32 = 100;

// v1

fn spec_v1() -> Value {
    let (kind, family) = (".targetGroup.targetType", ".targetGroup.ipAddressType");
    with(
        object(
            "What is wanted.",
            json!({
                "targetGroup": target_group(),
                "serviceRef": service_ref(),
                "networking": networking(false),
                "nodeSelector": node_selector_schema(),
            }),
        ),
        json!({
            "required": ["targetGroup", "serviceRef"],
            "x-kubernetes-validations": rules_of_spec(kind, family),
        }),
    )
}

fn target_group() -> Value {
    let external_id = format!("!{} || {}", set("self", "externalID"), set("self", "roleARN"));
    let assume_role = with(
        object(
            "The IAM role to assume for a target group of another account. IP targets only.",
            json!({"roleARN": role_arn(), "externalID": external_id_schema()}),
        ),
        json!({
            "minProperties": 1,
            "x-kubernetes-validations": [rule(&external_id, "TGB401 externalID needs a roleARN")],
        }),
    );
    with(
        object(
            "The target group and how targets are registered there.",
            json!({
                "arn": arn(),
                "name": group_name(),
                "targetType": one_of("Kind of the targets. Defaulted from the target group.", &TARGET_TYPES),
                "protocol": one_of("Protocol of the target group. Defaulted from it.", &PROTOCOLS),
                "ipAddressType":
                    one_of("IP address type of the target group. Defaulted from it.", &IP_ADDRESS_TYPES),
                "vpcID": vpc_id(),
                "sharing": one_of(
                    "Exclusive (when absent): targets that this binding does not want are deregistered. Shared: \
                     others, such as other clusters, register targets there too.",
                    &["Exclusive", "Shared"],
                ),
                "assumeRole": assume_role,
            }),
        ),
        json!({
            "minProperties": 1,
            "x-kubernetes-validations": [
                kept_rule(
                    |it| format!("{} || {}", set(it, "arn"), set(it, "name")),
                    "TGB101 arn or name of the target group must be set",
                ),
                kept_rule(
                    |it| {
                        let role = set(&format!("{it}.assumeRole"), "roleARN");
                        format!("!has({it}.assumeRole) || !{role} || {}", is(it, ".targetType", "ip"))
                    },
                    "TGB401 assumeRole is for ip targets only",
                ),
                kept_rule(|it| quic(it, "protocol"), QUIC),
            ],
        }),
    )
}

// v1beta1 and v1alpha1

fn spec_old() -> Value {
    let properties = json!({
        "targetGroupARN": arn(),
        "targetGroupName": group_name(),
        "multiClusterTargetGroup": {
            "type": "boolean",
            "description": "Whether others, such as other clusters, register targets there too.",
        },
        "targetType": one_of("Kind of the targets. Defaulted from the target group.", &TARGET_TYPES),
        "serviceRef": service_ref(),
        "networking": networking(true),
        "iamRoleArnToAssume": role_arn(),
        "assumeRoleExternalId": external_id_schema(),
        "targetGroupProtocol": one_of("Protocol of the target group. Defaulted from it.", &PROTOCOLS),
        "ipAddressType": one_of("IP address type of the target group. Defaulted from it.", &IP_ADDRESS_TYPES),
        "vpcID": vpc_id(),
        "nodeSelector": node_selector_schema(),
    });
    let mut rules = vec![
        kept_rule(
            |it| format!("{} || {}", set(it, "targetGroupARN"), set(it, "targetGroupName")),
            "TGB101 targetGroupARN or targetGroupName must be set",
        ),
        kept_rule(
            |it| format!("!{} || {}", set(it, "assumeRoleExternalId"), set(it, "iamRoleArnToAssume")),
            "TGB401 assumeRoleExternalId needs an iamRoleArnToAssume",
        ),
        kept_rule(
            |it| format!("!{} || {}", set(it, "iamRoleArnToAssume"), is(it, ".targetType", "ip")),
            "TGB401 iamRoleArnToAssume is for ip targets only",
        ),
        kept_rule(|it| quic(it, "targetGroupProtocol"), QUIC),
    ];
    rules.extend(rules_of_spec(".targetType", ".ipAddressType"));
    with(
        object("What is wanted.", properties),
        json!({"required": ["serviceRef"], "x-kubernetes-validations": rules}),
    )
}

// The same in all versions

/// Rules over several parts of `spec`; `kind` and `family` lead to the target group's type and address type. Those about
/// `networking` look where one of the parts has changed: the cost of a look into its old lists can't be estimated from here.
fn rules_of_spec(kind: &str, family: &str) -> Vec<Value> {
    let group = kind.strip_suffix(".targetType").filter(|group| !group.is_empty());
    // Absent only in objects that came from an old version.
    let unknown = |it: &str| group.map_or(String::new(), |group| format!("!has({it}{group}) || "));
    let networking_rule = |holds: &str, part: &str, message: &str| {
        let ingress = format!(
            "!has(self.networking) || !has(self.networking.ingress) || self.networking.ingress.all(i, {holds})"
        );
        let old = "oldSelf.value()";
        // A part that an old release left out, and that is filled in now, is no change.
        let same = format!("{}!has({old}{part}) || self{part} == {old}{part}", unknown(old));
        let networking = format!("has({old}.networking) && self.networking == {old}.networking");
        let kept = format!("oldSelf.hasValue() && {networking} && ({same})");
        let expression = format!("({}!has(self{part}) || {ingress}) || ({kept})", unknown("self"));
        json!({"rule": expression, "message": message, "optionalOldSelf": true})
    };
    let fits = format!("p.ipBlock.cidr.contains(':') == (self{family} == 'ipv6')");
    let networks = each("i", "from", "p", &format!("!has(p.ipBlock) || {fits}"));
    let numbers = each("i", "ports", "p", "!has(p.port) || type(p.port) == int");
    vec![
        kept_rule(
            |it| format!("!has({it}.nodeSelector) || {}{}", unknown(it), is(it, kind, "instance")),
            "TGB301 nodeSelector is for instance targets only",
        ),
        networking_rule(
            &networks,
            family,
            "TGB303 the networks of networking must be of the target group's ipAddressType",
        ),
        networking_rule(
            &format!("self{kind} != 'instance' || {numbers}"),
            kind,
            "TGB305 a networking port by name is for ip targets only",
        ),
    ]
}

/// A text that is there and not empty.
fn set(it: &str, field: &str) -> String {
    format!("(has({it}.{field}) && size({it}.{field}) > 0)")
}

/// The target type that is wanted, or none yet.
fn is(it: &str, kind: &str, wanted: &str) -> String {
    format!("!has({it}{kind}) || {it}{kind} == '{wanted}'")
}

fn quic(it: &str, protocol: &str) -> String {
    let quic = format!("{it}.{protocol} in ['QUIC', 'TCP_QUIC']");
    format!("!has({it}.{protocol}) || !({quic}) || {}", is(it, ".targetType", "ip"))
}

const QUIC: &str = "TGB405 QUIC protocols are for ip targets only";

/// All items of a list that may be absent, or null as LBC's types write an empty one.
fn each(of: &str, list: &str, item: &str, holds: &str) -> String {
    format!("!has({of}.{list}) || dyn({of}.{list}) == null || {of}.{list}.all({item}, {holds})")
}

/// A text of a form, or empty, which is as good as absent.
fn formed(description: &str, most: u32, form: &str, message: &str) -> Value {
    with(
        bounded(description, most),
        json!({"x-kubernetes-validations": [rule(&format!("self == '' || self.matches('{form}')"), message)]}),
    )
}

fn arn() -> Value {
    formed(
        "ARN of the target group. Filled in from the name if absent.",
        256,
        "^arn:aws(-[a-z0-9-]*)?:elasticloadbalancing:[a-z0-9-]+:[0-9]{12}:targetgroup/[A-Za-z0-9-]{1,32}/[A-Za-z0-9]{1,64}$",
        "TGB102 must be the ARN of a target group: arn:PARTITION:elasticloadbalancing:REGION:ACCOUNT:targetgroup/NAME/ID",
    )
}

fn group_name() -> Value {
    formed(
        "Name of the target group, unique per account and region. The ARN wins.",
        253,
        "^[A-Za-z0-9]([A-Za-z0-9-]{0,30}[A-Za-z0-9])?$",
        "TGB212 must be the name of a target group: 1 to 32 letters, digits and hyphens, none of these at an end",
    )
}

fn vpc_id() -> Value {
    formed(
        "VPC of the target group. Defaulted from it.",
        253,
        "^vpc-([0-9a-f]{8}|[0-9a-f]{17})$",
        "TGB113 must be a VPC ID: vpc- followed by 8 or 17 hexadecimal digits",
    )
}

fn role_arn() -> Value {
    formed(
        "ARN of the IAM role to assume for a target group of another account. IP targets only.",
        256,
        "^arn:aws[^:]*:iam::[0-9]{12}:role/[^ \\\\t\\\\r\\\\n]+$",
        "TGB401 must be the ARN of a role such as arn:aws:iam::123456789012:role/name",
    )
}

fn external_id_schema() -> Value {
    bounded("External id that the role's trust policy asks for.", 253)
}

fn service_ref() -> Value {
    let name = with(
        bounded("Name of the Service, in the binding's namespace.", 253),
        json!({"x-kubernetes-validations": [rule(
            "self.matches('^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$')",
            "TGB212 must be the name of a Service: 1 to 63 of a-z, 0-9 and '-', and no '-' at an end",
        )]}),
    );
    let port = json!({
        "x-kubernetes-int-or-string": true,
        "maxLength": 253,
        "description": "Port of the Service, by number or name. Defaulted if the Service has one that fits.",
    });
    with(
        object("The Service whose endpoints are registered.", json!({"name": name, "port": port})),
        json!({"required": ["name"]}),
    )
}

/// `nullable`: LBC's types write an empty list as null.
fn networking(nullable: bool) -> Value {
    let port_number = json!({
        "x-kubernetes-int-or-string": true,
        "maxLength": 63,
        "description": "Number of the port, or the name of a container port (ip targets only). Absent: all ports.",
    });
    let port = object(
        "A port that is opened.",
        json!({"protocol": one_of("TCP if absent.", &["TCP", "UDP"]), "port": port_number}),
    );
    let peer = object(
        "Who may reach the targets: exactly one of securityGroup and ipBlock.",
        json!({
            "securityGroup": with(
                object("Members of a security group.", json!({"groupID": bounded("Id of the security group.", 32)})),
                json!({"required": ["groupID"]}),
            ),
            "ipBlock": with(
                object("A network.", json!({"cidr": bounded("IPv4 or IPv6 network in CIDR notation.", 64)})),
                json!({"required": ["cidr"]}),
            ),
        }),
    );
    let list = |description: &str, items: Value, most: u32| {
        with(atomic_list(description, items), json!({"maxItems": most}))
    };
    let may_be_null = |list: Value| if nullable { with(list, json!({"nullable": true})) } else { list };
    let from = may_be_null(list("Who may reach the targets.", peer, MOST_PEERS));
    let ports = may_be_null(list("At which ports. Absent or empty: all TCP ports.", port, MOST_PORTS));
    let ingress = with(
        object("Peers and the ports that they may reach.", json!({"from": from, "ports": ports})),
        json!({"required": ["from"]}),
    );
    let ingress_rule = |holds: String, message: &str| {
        kept_rule(|it| format!("!has({it}.ingress) || {it}.ingress.all(i, {holds})"), message)
    };
    let short =
        |list: &str| format!("(!has(i.{list}) || dyn(i.{list}) == null || size(i.{list}) <= {ITEMS})");
    let lengths = kept_rule(
        |it| {
            let items = format!("{it}.ingress.all(i, {} && {})", short("from"), short("ports"));
            format!("!has({it}.ingress) || (size({it}.ingress) <= {ITEMS} && {items})")
        },
        &format!("TGB308 ingress, from and ports have at most {ITEMS} entries each"),
    );
    let peers = "has(i.from) && dyn(i.from) != null && size(i.from) > 0 && \
        i.from.all(p, has(p.securityGroup) != has(p.ipBlock))";
    let port = "!has(p.port) || (type(p.port) == int ? p.port >= 1 && p.port <= 65535 : size(p.port) <= 15 && \
        p.port.matches('^[a-z0-9]([a-z0-9-]*[a-z0-9])?$') && p.port.matches('[a-z]') && !p.port.contains('--'))";
    let group = "!has(p.securityGroup) || p.securityGroup.groupID.matches('^sg-([0-9a-f]{8}|[0-9a-f]{17})$')";
    with(
        object(
            "What may reach the targets, as rules of their security groups. Absent: security groups are left alone.",
            json!({"ingress": list("Rules of what may reach the targets.", ingress, MOST_INGRESS)}),
        ),
        json!({"x-kubernetes-validations": [
            lengths,
            ingress_rule(
                peers.to_owned(),
                "TGB302 from needs at least one peer, and a peer exactly one of securityGroup and ipBlock",
            ),
            ingress_rule(
                each("i", "from", "p", "!has(p.ipBlock) || isCIDR(p.ipBlock.cidr)"),
                "TGB303 cidr must be a network in CIDR notation such as 10.0.0.0/16",
            ),
            ingress_rule(
                each("i", "from", "p", group),
                "TGB304 groupID must be a security group ID: sg- followed by 8 or 17 hexadecimal digits",
            ),
            ingress_rule(
                each("i", "ports", "p", port),
                "TGB305 port must be in 1-65535 or a port name (at most 15 of a-z, 0-9, '-', with a letter)",
            ),
        ]}),
    )
}

/// `metav1.LabelSelector`. The syntax of the keys of `matchLabels`, whose length CEL can't bound, is left to the webhook.
fn node_selector_schema() -> Value {
    let value = json!({"type": "string", "maxLength": 63});
    let requirement = with(
        object(
            "A requirement on a label.",
            json!({
                "key": bounded("Key of the label.", 317),
                "operator": bounded("In, NotIn, Exists or DoesNotExist.", 253),
                "values": with(atomic_list("Values for In and NotIn.", value.clone()), json!({"maxItems": 200})),
            }),
        ),
        json!({"required": ["key", "operator"]}),
    );
    let operators = "!has(self.matchExpressions) || self.matchExpressions.all(e, e.operator in ['In', 'NotIn'] ? \
        has(e.values) && size(e.values) > 0 : e.operator in ['Exists', 'DoesNotExist'] && \
        (!has(e.values) || size(e.values) == 0))";
    let label = "(([A-Za-z0-9][A-Za-z0-9_.-]*)?[A-Za-z0-9])";
    let key = format!(
        "!has(self.matchExpressions) || self.matchExpressions.all(e, e.key.matches('^([a-z0-9.-]{{1,253}}/)?{label}$'))"
    );
    let values = format!(
        "(!has(self.matchLabels) || self.matchLabels.all(k, self.matchLabels[k].matches('^{label}?$'))) && \
         (!has(self.matchExpressions) || self.matchExpressions.all(e, !has(e.values) || \
         e.values.all(v, v.matches('^{label}?$'))))"
    );
    with(
        object(
            "Which nodes are registered. Instance targets only.",
            json!({
                "matchLabels": {
                    "type": "object",
                    "description": "Labels and their values, all of which must match.",
                    "maxProperties": 100,
                    "additionalProperties": value,
                },
                "matchExpressions": with(
                    atomic_list("Requirements, all of which must match.", requirement),
                    json!({"maxItems": 100}),
                ),
            }),
        ),
        json!({
            "x-kubernetes-map-type": "atomic",
            "x-kubernetes-validations": [
                rule(operators, "TGB301 operator is In or NotIn with values, or Exists or DoesNotExist without"),
                rule(&key, "TGB301 key must be a label key"),
                rule(&values, "TGB301 values must be label values: at most 63 letters, digits, '-', '_' and '.'"),
            ],
        }),
    )
}

enum Conditions {
    /// One per type.
    ByType,
    /// LBC's list has no keys, so it may hold a type twice.
    AsLbc,
}

fn status(conditions: Conditions) -> Value {
    let list = match conditions {
        Conditions::ByType => {
            json!({"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]})
        }
        Conditions::AsLbc => json!({"x-kubernetes-list-type": "atomic"}),
    };
    let count = |description: &str| json!({"type": "integer", "format": "int64", "minimum": 0, "description": description});
    let base = json!({"type": "array", "description": "What is true of the binding.", "items": condition()});
    object(
        "What the controller saw.",
        json!({
            "observedGeneration": {
                "type": "integer",
                "format": "int64",
                "description": "Generation of the object that the last pass looked at.",
            },
            "targetGroupARN": bounded("ARN that was resolved; clean-up uses it.", 256),
            "conditions": with(base, list),
            "targets": object("Counts of this binding's targets.", json!({
                "desired": count("How many the cluster wants."),
                "registered": count("How many of these are registered."),
                "healthy": count("How many of these are healthy."),
                "unhealthy": count("How many of these are unhealthy."),
                "draining": count("How many targets of the group are draining."),
                "summary": bounded("Healthy and desired, for people.", 253),
                "observedAt": {
                    "type": "string",
                    "format": "date-time",
                    "description": "When AWS was last asked.",
                },
            })),
            "firstContact": object(
                "Since when this binding works on its target group. It names its owner: a copy of it gives no right to \
                 any target.",
                json!({
                    "cluster": bounded("Name of the cluster whose controller wrote it.", 253),
                    "bindingUID": bounded("UID of the binding that it is about.", 128),
                    "targetGroupARN": bounded("ARN of the target group that it is about.", 256),
                    "sharing": one_of("How the target group was shared.", &["Exclusive", "Shared"]),
                    "since": {
                        "type": "string",
                        "format": "date-time",
                        "description": "Time of the first pass that could write.",
                    },
                    "foreignTargets": with(
                        atomic_list(
                            "Targets that are not this cluster's. They stay until the annotation \
                             elbv2.k8s.aws/adopt-targets or --foreign-targets-grace lets them go.",
                            json!({"type": "string", "maxLength": 64}),
                        ),
                        json!({"maxItems": FirstContact::MOST_LISTED}),
                    ),
                }),
            ),
        }),
    )
}

/// `metav1.Condition` with its own bounds.
fn condition() -> Value {
    let name = "^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?\
        (([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])$";
    with(
        object(
            "One aspect of the binding's state.",
            json!({
                "type": with(bounded("Name of the aspect.", 316), json!({"pattern": name})),
                "status": one_of("Whether it holds.", &["True", "False", "Unknown"]),
                "reason": with(
                    bounded("The cause, for programs.", 1024),
                    json!({"minLength": 1, "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"}),
                ),
                "message": bounded("The cause, for people.", 32768),
                "lastTransitionTime": {
                    "type": "string",
                    "format": "date-time",
                    "description": "When the status last changed.",
                },
                "observedGeneration": {
                    "type": "integer",
                    "format": "int64",
                    "minimum": 0,
                    "description": "Generation of the object that this was set for.",
                },
            }),
        ),
        json!({"required": ["lastTransitionTime", "message", "reason", "status", "type"]}),
    )
}

// Building blocks

fn object(description: &str, properties: Value) -> Value {
    json!({"type": "object", "description": description, "properties": properties})
}

fn text(description: &str) -> Value {
    json!({"type": "string", "description": description})
}

fn bounded(description: &str, most: u32) -> Value {
    json!({"type": "string", "description": description, "maxLength": most})
}

fn one_of(description: &str, words: &[&str]) -> Value {
    json!({"type": "string", "description": description, "enum": words})
}

fn atomic_list(description: &str, items: Value) -> Value {
    json!({"type": "array", "description": description, "items": items, "x-kubernetes-list-type": "atomic"})
}

fn rule(expression: &str, message: &str) -> Value {
    json!({"rule": expression, "message": message})
}

/// A rule that an update need not satisfy if the old object did not either.
fn kept_rule(holds: impl Fn(&str) -> String, message: &str) -> Value {
    let expression =
        format!("({}) || (oldSelf.hasValue() && !({}))", holds("self"), holds("oldSelf.value()"));
    json!({"rule": expression, "message": message, "optionalOldSelf": true})
}

/// `base` with the members of `more`.
fn with(mut base: Value, more: Value) -> Value {
    if let (Value::Object(base), Value::Object(more)) = (&mut base, more) {
        base.extend(more);
    }
    base
}
