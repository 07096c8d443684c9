//! The CustomResourceDefinition with all three versions.
//!
//! v1 is strict: rules that need only the object are CEL, their messages begin with the rule's id. v1beta1 and v1alpha1
//! accept what the AWS Load Balancer Controller's (LBC's) schema accepts on update: no bounds on its fields, and every
//! rule there lets an object keep a fault that it already had. Rules over lists are in v1 only, since CEL's cost
//! estimate needs bounds; the webhook holds all versions against them.

use crate::names;
use serde_json::{Value, json};

/// A served version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Version {
    /// The hub.
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

// v1

fn spec_v1() -> Value {
    let networking_names = "!has(self.targetGroup.targetType) || self.targetGroup.targetType != 'instance' || \
        !has(self.networking) || !has(self.networking.ingress) || \
        self.networking.ingress.all(i, !has(i.ports) || i.ports.all(p, !has(p.port) || type(p.port) == int))";
    let node_selector = "!has(self.nodeSelector) || !has(self.targetGroup.targetType) || \
        self.targetGroup.targetType == 'instance'";
    with(
        object(
            "What is wanted.",
            json!({
                "targetGroup": target_group(),
                "serviceRef": service_ref(true),
                "networking": networking(true),
                "nodeSelector": node_selector_schema(),
            }),
        ),
        json!({
            "required": ["targetGroup", "serviceRef"],
            "x-kubernetes-validations": [
                rule(node_selector, "TGB301 nodeSelector is for instance targets only"),
                rule(networking_names, "TGB305 a networking port by name is for ip targets only"),
            ],
        }),
    )
}

fn target_group() -> Value {
    let set = |field: &str| format!("(has(self.{field}) && size(self.{field}) > 0)");
    let named = format!("{} || {}", set("arn"), set("name"));
    let quic = "!has(self.protocol) || !(self.protocol in ['QUIC', 'TCP_QUIC']) || !has(self.targetType) || \
        self.targetType == 'ip'";
    let role = "!has(self.assumeRole) || !has(self.assumeRole.roleARN) || size(self.assumeRole.roleARN) == 0 || \
        !has(self.targetType) || self.targetType == 'ip'";
    let external_id = format!("!{} || {}", set("externalID"), set("roleARN"));
    let assume_role = with(
        object(
            "The IAM role to assume for a target group of another account. IP targets only.",
            json!({
                "roleARN": bounded("ARN of the role.", 256),
                "externalID": bounded("External id that the role's trust policy asks for.", 253),
            }),
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
                "arn": bounded("ARN of the target group. Filled in from the name if absent.", 256),
                "name": bounded("Name of the target group, unique per account and region. The ARN wins.", 253),
                "targetType": one_of("Kind of the targets. Defaulted from the target group.", &TARGET_TYPES),
                "protocol": one_of("Protocol of the target group. Defaulted from it.", &PROTOCOLS),
                "ipAddressType":
                    one_of("IP address type of the target group. Defaulted from it.", &IP_ADDRESS_TYPES),
                "vpcID": bounded("VPC of the target group. Defaulted from it.", 253),
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
                rule(&named, "TGB101 arn or name of the target group must be set"),
                rule(role, "TGB401 assumeRole is for ip targets only"),
                rule(quic, "TGB405 QUIC protocols are for ip targets only"),
            ],
        }),
    )
}

// v1beta1 and v1alpha1

fn spec_old() -> Value {
    let set = |it: &str, field: &str| format!("(has({it}.{field}) && size({it}.{field}) > 0)");
    let kind = |it: &str, wanted: &str| format!("!has({it}.targetType) || {it}.targetType == '{wanted}'");
    let properties = json!({
        "targetGroupARN": text("ARN of the target group. Filled in from the name if absent."),
        "targetGroupName": text("Name of the target group, unique per account and region. The ARN wins."),
        "multiClusterTargetGroup": {
            "type": "boolean",
            "description": "Whether others, such as other clusters, register targets there too.",
        },
        "targetType": one_of("Kind of the targets. Defaulted from the target group.", &TARGET_TYPES),
        "serviceRef": service_ref(false),
        "networking": networking(false),
        "iamRoleArnToAssume":
            text("ARN of the IAM role to assume for a target group of another account. IP targets only."),
        "assumeRoleExternalId": text("External id that the role's trust policy asks for."),
        "targetGroupProtocol": one_of("Protocol of the target group. Defaulted from it.", &PROTOCOLS),
        "ipAddressType": one_of("IP address type of the target group. Defaulted from it.", &IP_ADDRESS_TYPES),
        "vpcID": text("VPC of the target group. Defaulted from it."),
        "nodeSelector": node_selector_schema(),
    });
    let rules = [
        kept_rule(
            |it| format!("{} || {}", set(it, "targetGroupARN"), set(it, "targetGroupName")),
            "TGB101 targetGroupARN or targetGroupName must be set",
        ),
        kept_rule(
            |it| format!("!{} || {}", set(it, "assumeRoleExternalId"), set(it, "iamRoleArnToAssume")),
            "TGB401 assumeRoleExternalId needs an iamRoleArnToAssume",
        ),
        kept_rule(
            |it| format!("!{} || {}", set(it, "iamRoleArnToAssume"), kind(it, "ip")),
            "TGB401 iamRoleArnToAssume is for ip targets only",
        ),
        kept_rule(
            |it| format!("!has({it}.nodeSelector) || {}", kind(it, "instance")),
            "TGB301 nodeSelector is for instance targets only",
        ),
        kept_rule(
            |it| {
                let quic = format!("{it}.targetGroupProtocol in ['QUIC', 'TCP_QUIC']");
                format!("!has({it}.targetGroupProtocol) || !({quic}) || {}", kind(it, "ip"))
            },
            "TGB405 QUIC protocols are for ip targets only",
        ),
    ];
    with(
        object("What is wanted.", properties),
        json!({"required": ["serviceRef"], "x-kubernetes-validations": rules}),
    )
}

// The same in all versions, but for bounds and rules

fn service_ref(strict: bool) -> Value {
    let mut name = text("Name of the Service, in the binding's namespace.");
    let mut port = json!({
        "x-kubernetes-int-or-string": true,
        "description": "Port of the Service, by number or name. Defaulted if the Service has one that fits.",
    });
    if strict {
        name = with(name, json!({"minLength": 1, "maxLength": 253}));
        port = with(port, json!({"maxLength": 253}));
    }
    with(
        object("The Service whose endpoints are registered.", json!({"name": name, "port": port})),
        json!({"required": ["name"]}),
    )
}

fn networking(strict: bool) -> Value {
    let string = |description: &str| {
        if strict { bounded(description, 253) } else { text(description) }
    };
    let mut port_number = json!({
        "x-kubernetes-int-or-string": true,
        "description": "Number of the port, or the name of a container port (ip targets only). Absent: all ports.",
    });
    let mut port =
        object("A port that is opened.", json!({"protocol": one_of("TCP if absent.", &["TCP", "UDP"])}));
    let mut peer = object(
        "Who may reach the targets: exactly one of securityGroup and ipBlock.",
        json!({
            "securityGroup": with(
                object("Members of a security group.", json!({"groupID": string("Id of the security group.")})),
                json!({"required": ["groupID"]}),
            ),
            "ipBlock": with(
                object("A network.", json!({"cidr": string("IPv4 or IPv6 network in CIDR notation.")})),
                json!({"required": ["cidr"]}),
            ),
        }),
    );
    let mut from_rules = json!({});
    let mut bound = json!({});
    if strict {
        port_number = with(port_number, json!({"maxLength": 253}));
        let valid = "!has(self.port) || (type(self.port) == int ? self.port >= 1 && self.port <= 65535 : \
            size(self.port) <= 15 && self.port.matches('^[a-z0-9]([a-z0-9-]*[a-z0-9])?$') && \
            self.port.matches('[a-z]'))";
        port = with(
            port,
            json!({"x-kubernetes-validations": [rule(
                valid,
                "TGB305 port must be in 1-65535 or a port name (at most 15 of a-z, 0-9, '-', with a letter)",
            )]}),
        );
        peer = with(
            peer,
            json!({"x-kubernetes-validations": [rule(
                "has(self.securityGroup) != has(self.ipBlock)",
                "TGB302 a peer needs exactly one of securityGroup and ipBlock",
            )]}),
        );
        from_rules = json!({
            "x-kubernetes-validations": [rule("size(self) > 0", "TGB302 from needs at least one peer")],
        });
        bound = json!({"maxItems": 50});
    }
    let port = with_property(port, "port", port_number);
    let list = |description: &str, items: Value| {
        let made = json!({
            "type": "array",
            "description": description,
            "items": items,
            "x-kubernetes-list-type": "atomic",
        });
        with(made, bound.clone())
    };
    let mut from = with(list("Who may reach the targets.", peer), from_rules);
    let mut ports = list("At which ports. Absent or empty: all TCP ports.", port);
    if !strict {
        // LBC's types write an empty list as null.
        from = with(from, json!({"nullable": true}));
        ports = with(ports, json!({"nullable": true}));
    }
    let ingress = with(
        object("Peers and the ports that they may reach.", json!({"from": from, "ports": ports})),
        json!({"required": ["from"]}),
    );
    object(
        "What may reach the targets, as rules of their security groups. Absent: security groups are left alone.",
        json!({"ingress": list("Rules of what may reach the targets.", ingress)}),
    )
}

/// `metav1.LabelSelector`, without bounds: LBC has none.
fn node_selector_schema() -> Value {
    let requirement = with(
        object(
            "A requirement on a label.",
            json!({
                "key": text("Key of the label."),
                "operator": text("In, NotIn, Exists or DoesNotExist."),
                "values": atomic_list("Values for In and NotIn.", json!({"type": "string"})),
            }),
        ),
        json!({"required": ["key", "operator"]}),
    );
    with(
        object(
            "Which nodes are registered. Instance targets only.",
            json!({
                "matchLabels": {
                    "type": "object",
                    "description": "Labels and their values, all of which must match.",
                    "additionalProperties": {"type": "string"},
                },
                "matchExpressions": atomic_list("Requirements, all of which must match.", requirement),
            }),
        ),
        json!({"x-kubernetes-map-type": "atomic"}),
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

fn with_property(mut base: Value, name: &str, schema: Value) -> Value {
    if let Some(Value::Object(properties)) = base.get_mut("properties") {
        properties.insert(name.to_owned(), schema);
    }
    base
}
