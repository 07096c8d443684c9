//! Thousands of bindings with Services, EndpointSlices and pods on a real API server. They are written into etcd, as a
//! restored backup is, since the API server takes minutes to admit as many; whoever watches sees ordinary events.

use crate::http::{Connection, Place};
use crate::stage::Stage;
use crate::table::Side;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use tgb_e2e::{Aws, Result};

/// The namespace of everything.
pub(crate) const NAMESPACE: &str = "bench";
/// Changes that are held back until they are written.
const AT_ONCE: usize = 100;

/// What is there.
pub(crate) struct Fleet {
    etcd: Connection,
    side: Side,
    vpc: String,
    changes: Vec<(&'static str, Value)>,
    /// The target groups, by number of the binding.
    pub arns: Vec<String>,
    /// Interfaces, each with a security group of its own: those of the pods of bindings with `networking`, in turn. Without
    /// any, no binding has it.
    interfaces: Vec<String>,
    /// The load balancer's security group.
    peer: String,
}

/// The address of a pod, by its number below 65,000: 10.244.0.0/16 is the pods' subnet.
pub(crate) fn ip(serial: usize) -> String {
    format!("10.244.{}.{}", (serial + 2) / 256, (serial + 2) % 256)
}

impl Fleet {
    /// Nothing yet, but the namespace. Everybody who would take part is stopped: the objects are the bench's own.
    pub(crate) async fn new(stage: &Stage) -> Result<Self> {
        let cluster = &stage.cluster;
        cluster.namespace(NAMESPACE, &BTreeMap::new())?;
        for name in ["kube-controller-manager", "kube-scheduler", "kwok"] {
            cluster.processes().pause(name)?;
        }
        let etcd = Place::plain(cluster.etcd()).connect().await?;
        let vpc = stage.aws.lab().vpc.clone();
        let (changes, arns, interfaces) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { etcd, side: stage.side(), vpc, changes, arns, interfaces, peer: String::new() })
    }

    /// Bindings that are made from now on open a port of their own to the load balancer in one of so many security groups.
    pub(crate) fn networking(&mut self, aws: &Aws, groups: usize) -> Result<()> {
        let server = aws.server().ok_or("this needs awsim")?;
        let lab = aws.lab().clone();
        self.interfaces = server.seed(awsim::DEFAULT_ACCOUNT, "us-west-2", |account| {
            let one = |account: &mut awsim::Aws| {
                let (eni, group) = (account.new_id("eni"), account.new_id("sg"));
                account.add_security_group(&group, &lab.vpc, &format!("bench-{group}"), BTreeMap::new());
                let interface = awsim::Eni {
                    id: eni.clone(),
                    vpc: lab.vpc.clone(),
                    subnet: lab.subnets[0].clone(),
                    groups: vec![group],
                    ..awsim::Eni::default()
                };
                account.enis.insert(eni.clone(), interface);
                eni
            };
            (0..groups).map(|_| one(account)).collect()
        });
        self.peer = lab.lb_group;
        Ok(())
    }

    /// The interface of a binding's pods.
    fn interface(&self, n: usize) -> Option<&str> {
        self.interfaces.get(n % self.interfaces.len().max(1)).map(String::as_str)
    }

    /// Target groups up to `count`, each behind a listener of a load balancer.
    pub(crate) fn target_groups(&mut self, aws: &Aws, count: usize) -> Result<()> {
        let made = groups(aws, "ip", self.arns.len()..count)?;
        self.arns.extend(made);
        Ok(())
    }

    /// Instances, the nodes that they are to the cluster, and bindings of all of these.
    pub(crate) async fn instances(&mut self, aws: &Aws, nodes: usize, bindings: usize) -> Result<()> {
        let server = aws.server().ok_or("this needs awsim")?;
        let instance = |n: usize| awsim::Node { instance: instance(n), subnet: n, ..awsim::Node::default() };
        let cluster =
            awsim::Cluster { nodes: (0..nodes).map(instance).collect(), ..awsim::Cluster::default() };
        server.seed(awsim::DEFAULT_ACCOUNT, "us-west-2", |account| account.seed_cluster(&cluster));
        for n in 0..nodes {
            self.node(n, true, 0).await?;
        }
        for (n, arn) in groups(aws, "instance", 0..bindings)?.iter().enumerate() {
            let name = format!("nodes-{n}");
            let mut service = service(n);
            service["metadata"]["name"] = json!(name);
            service["spec"] = json!({
                "type": "NodePort", "clusterIP": format!("10.0.{}.{}", 200 + n / 250, n % 250 + 1), "selector": {"app": name},
                "clusterIPs": [format!("10.0.{}.{}", 200 + n / 250, n % 250 + 1)], "ipFamilies": ["IPv4"],
                "ipFamilyPolicy": "SingleStack", "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
                "externalTrafficPolicy": "Cluster",
                "ports": [{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP", "nodePort": 30_000 + n}],
            });
            self.put(&format!("services/specs/{NAMESPACE}/{name}"), &service).await?;
            let mut binding = self.binding(0);
            binding["metadata"]["name"] = json!(name);
            binding["metadata"]["uid"] = json!(uid(6, n, 0));
            binding["metadata"]["annotations"] = json!({});
            binding["spec"]["targetGroup"]["arn"] = json!(arn);
            binding["spec"]["targetGroup"]["targetType"] = json!("instance");
            binding["spec"]["serviceRef"] = json!({"name": name, "port": 80});
            self.put(&format!("elbv2.k8s.aws/targetgroupbindings/{NAMESPACE}/{name}"), &binding).await?;
        }
        self.flush().await
    }

    /// Sets a node of [`Self::instances`]; `feature` is a label that no binding asks for.
    pub(crate) async fn node(&mut self, n: usize, ready: bool, feature: usize) -> Result<()> {
        self.put(&format!("minions/bench-{n}"), &node(n, ready, feature)).await
    }

    /// Bindings, Services, slices and pods for the binding numbers `range`, with `pods` pods each: those of binding `n` are
    /// numbered from `n * pods` on.
    pub(crate) async fn bindings(&mut self, range: std::ops::Range<usize>, pods: usize) -> Result<()> {
        for n in range {
            self.put(&format!("services/specs/{NAMESPACE}/web-{n}"), &service(n)).await?;
            let serials: Vec<usize> = (0..pods).map(|k| n * pods + k).collect();
            for serial in &serials {
                let mut pod = pod(n, *serial);
                if let Some(eni) = self.interface(n) {
                    let annotation = json!([{"eniId": eni}]).to_string();
                    pod["metadata"]["annotations"]["vpc.amazonaws.com/pod-eni"] = json!(annotation);
                }
                self.put(&format!("pods/{NAMESPACE}/web-{n}-{serial}"), &pod).await?;
            }
            self.put(&format!("endpointslices/{NAMESPACE}/web-{n}"), &slice(n, &serials)).await?;
            let key = format!("elbv2.k8s.aws/targetgroupbindings/{NAMESPACE}/web-{n}");
            self.put(&key, &self.binding(n)).await?;
        }
        self.flush().await
    }

    /// A Service with a slice and these pods, and no binding.
    pub(crate) async fn backend(&mut self, n: usize, serials: &[usize]) -> Result<()> {
        self.put(&format!("services/specs/{NAMESPACE}/web-{n}"), &service(n)).await?;
        for serial in serials {
            self.pod(n, *serial).await?;
        }
        self.endpoints(n, serials).await?;
        self.flush().await
    }

    /// Takes bindings away as if they had never been: nobody deregisters.
    pub(crate) async fn remove_bindings(&mut self, range: std::ops::Range<usize>) -> Result<()> {
        for n in range {
            let key = format!("/registry/elbv2.k8s.aws/targetgroupbindings/{NAMESPACE}/web-{n}");
            self.change("/v3/kv/deleterange", json!({"key": BASE64.encode(key)})).await?;
        }
        self.flush().await
    }

    /// Pods that no binding uses.
    pub(crate) async fn strangers(&mut self, range: std::ops::Range<usize>) -> Result<()> {
        for serial in range {
            let mut object = pod(1_000_000, serial);
            object["metadata"]["name"] = json!(format!("stranger-{serial}"));
            self.put(&format!("pods/{NAMESPACE}/stranger-{serial}"), &object).await?;
        }
        self.flush().await
    }

    /// Puts one pod there.
    pub(crate) async fn pod(&mut self, n: usize, serial: usize) -> Result<()> {
        self.put(&format!("pods/{NAMESPACE}/web-{n}-{serial}"), &pod(n, serial)).await
    }

    /// Sets the endpoints of a binding.
    pub(crate) async fn endpoints(&mut self, n: usize, serials: &[usize]) -> Result<()> {
        self.put(&format!("endpointslices/{NAMESPACE}/web-{n}"), &slice(n, serials)).await
    }

    /// Takes a pod away.
    pub(crate) async fn remove_pod(&mut self, n: usize, serial: usize) -> Result<()> {
        let key = BASE64.encode(format!("/registry/pods/{NAMESPACE}/web-{n}-{serial}"));
        self.change("/v3/kv/deleterange", json!({"key": key})).await
    }

    /// The version of the bindings.
    pub(crate) fn version(&self) -> &'static str {
        match self.side {
            Side::Ours => "v1",
            Side::Peer => "v1beta1",
        }
    }

    /// A binding as a user writes it, with ARN and Service only.
    pub(crate) fn manifest(&self, n: usize) -> Value {
        let (name, arn) = (format!("web-{n}"), &self.arns[n]);
        let spec = match self.side {
            Side::Ours => json!({"serviceRef": {"name": name}, "targetGroup": {"arn": arn}}),
            Side::Peer => json!({"serviceRef": {"name": name, "port": 80}, "targetGroupARN": arn}),
        };
        json!({"apiVersion": format!("elbv2.k8s.aws/{}", self.version()), "kind": "TargetGroupBinding",
               "metadata": {"name": name, "namespace": NAMESPACE}, "spec": spec})
    }

    /// The same as stored, complete.
    pub(crate) fn binding(&self, n: usize) -> Value {
        let (mut object, applied) = (self.manifest(n), self.manifest(n).to_string());
        object["metadata"] = json!({
            "name": format!("web-{n}"), "namespace": NAMESPACE, "uid": uid(5, n, 0), "creationTimestamp": TIME, "generation": 1,
            "finalizers": ["elbv2.k8s.aws/resources"],
            "labels": {"app": format!("web-{n}"), "team": "shop"},
            "annotations": {"kubectl.kubernetes.io/last-applied-configuration": applied},
        });
        let (arn, vpc) = (&self.arns[n], &self.vpc);
        object["spec"] = match self.side {
            Side::Ours => json!({
                "targetGroup": {"arn": arn, "targetType": "ip", "ipAddressType": "ipv4", "protocol": "HTTP", "vpcID": vpc},
            }),
            Side::Peer => json!({
                "targetGroupARN": arn, "targetType": "ip", "ipAddressType": "ipv4", "targetGroupProtocol": "HTTP", "vpcID": vpc,
            }),
        };
        object["spec"]["serviceRef"] = json!({"name": format!("web-{n}"), "port": 80});
        if self.interface(n).is_some() {
            let from = json!([{"securityGroup": {"groupID": self.peer}}]);
            object["spec"]["networking"] =
                json!({"ingress": [{"from": from, "ports": [{"port": 10_000 + n, "protocol": "TCP"}]}]});
        }
        object
    }

    async fn put(&mut self, key: &str, object: &Value) -> Result<()> {
        let (key, value) = (BASE64.encode(format!("/registry/{key}")), BASE64.encode(object.to_string()));
        self.change("/v3/kv/put", json!({"key": key, "value": value})).await
    }

    async fn change(&mut self, path: &'static str, change: Value) -> Result<()> {
        self.changes.push((path, change));
        if self.changes.len() >= AT_ONCE { self.flush().await } else { Ok(()) }
    }

    /// Writes what is still held back.
    pub(crate) async fn flush(&mut self) -> Result<()> {
        if self.changes.is_empty() {
            return Ok(());
        }
        // Each has a revision of its own, as all that the API server writes. With one for many, a watch that begins anew among
        // them misses the rest, and the API server ends one that is slow to take a hundred at once.
        for (path, change) in std::mem::take(&mut self.changes) {
            let body = Bytes::from(change.to_string());
            let (status, answer) = self.etcd.send("POST", path, "application/json", body).await?;
            if status != 200 {
                return Err(format!("etcd: HTTP {status}: {}", String::from_utf8_lossy(&answer)));
            }
        }
        Ok(())
    }
}

const TIME: &str = "2026-01-01T00:00:00Z";

fn uid(kind: u32, n: usize, serial: usize) -> String {
    format!("{kind:08x}-0000-4000-8000-{:012x}", n * 1_000_000 + serial)
}

/// Target groups of a type, each behind a listener of a load balancer; their ARNs.
fn groups(aws: &Aws, target_type: &str, range: std::ops::Range<usize>) -> Result<Vec<String>> {
    let server = aws.server().ok_or("this needs awsim")?;
    let lab = aws.lab().clone();
    let made = server.seed(
        awsim::DEFAULT_ACCOUNT,
        "us-west-2",
        |account| -> std::result::Result<_, awsim::AwsError> {
            account.quotas.target_groups = 100_000;
            account.quotas.listeners = 100_000;
            for quota in [
                &mut account.quotas.targets_per_group,
                &mut account.quotas.targets_per_alb,
                &mut account.quotas.groups_per_alb,
                &mut account.quotas.registrations_per_alb,
            ] {
                *quota = 1_000_000;
            }
            let mut call =
                |action: &str, form: String| account.elb(action, &awsim::Params::parse(form.as_bytes()), 0);
            let id = |xml: awsim::Xml, name: &str| -> String {
                let text = xml.finish();
                let value = text.split(&format!("<{name}>")).nth(1).and_then(|rest| rest.split('<').next());
                value.unwrap_or_default().to_owned()
            };
            let mut form =
                format!("Name=bench-{target_type}-{}&SecurityGroups.member.1={}", range.start, lab.lb_group);
            for (n, subnet) in lab.subnets.iter().enumerate() {
                let _ = write!(form, "&Subnets.member.{}={subnet}", n + 1);
            }
            let balancer = id(call("CreateLoadBalancer", form)?, "LoadBalancerArn");
            let mut made = Vec::new();
            for n in range {
                let form = format!(
                    "Name=bench-{target_type}-{n}&Protocol=HTTP&Port=80&TargetType={target_type}&VpcId={}",
                    lab.vpc
                );
                let arn = id(call("CreateTargetGroup", form)?, "TargetGroupArn");
                let form = format!(
                    "LoadBalancerArn={balancer}&Protocol=HTTP&Port={}&DefaultActions.member.1.Type=forward\
                 &DefaultActions.member.1.TargetGroupArn={arn}",
                    n % 60_000 + 1
                );
                call("CreateListener", form)?;
                made.push(arn);
            }
            Ok(made)
        },
    );
    made.map_err(|error| format!("awsim: {error:?}"))
}

fn instance(n: usize) -> String {
    format!("i-0b{n:015x}")
}

/// A node as EKS and a kubelet leave it there, as far as anybody reads it.
fn node(n: usize, ready: bool, feature: usize) -> Value {
    let name = format!("bench-{n}");
    let zone = ["us-west-2a", "us-west-2b"][n % 2];
    let mut labels = json!({
        "kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64",
        "node.kubernetes.io/instance-type": "m7i.2xlarge", "topology.kubernetes.io/region": "us-west-2",
        "topology.kubernetes.io/zone": zone, "eks.amazonaws.com/nodegroup": "bench", "feature": feature.to_string(),
    });
    for k in 0..20 {
        labels[format!("feature.node.kubernetes.io/cpu-{k}")] = json!("true");
    }
    let ready = if ready { "True" } else { "False" };
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "uid": uid(7, n, 0), "creationTimestamp": TIME, "labels": labels},
        "spec": {"providerID": format!("aws:///{zone}/{}", instance(n))},
        "status": {
            "capacity": {"cpu": "8", "memory": "32Gi", "pods": "58"},
            "addresses": [{"type": "InternalIP", "address": format!("192.168.{}.{}", n / 250, n % 250 + 1)}],
            "conditions": [{"type": "Ready", "status": ready, "reason": "Kubelet", "lastTransitionTime": TIME}],
        },
    })
}

fn service(n: usize) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": format!("web-{n}"), "namespace": NAMESPACE, "uid": uid(1, n, 0), "creationTimestamp": TIME},
        "spec": {"type": "ClusterIP", "clusterIP": "None", "clusterIPs": ["None"], "ipFamilies": ["IPv4"],
                 "ipFamilyPolicy": "SingleStack", "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
                 "selector": {"app": format!("web-{n}")},
                 "ports": [{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}]},
        "status": {"loadBalancer": {}},
    })
}

/// An EndpointSlice as the endpoint slice controller writes it.
pub(crate) fn slice(n: usize, serials: &[usize]) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": format!("web-{n}"), "namespace": NAMESPACE, "uid": uid(2, n, 0), "creationTimestamp": TIME,
                     "labels": {"kubernetes.io/service-name": format!("web-{n}"),
                                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": endpoints(n, serials),
    })
}

/// The endpoints of [`slice`].
pub(crate) fn endpoints(n: usize, serials: &[usize]) -> Value {
    serials
        .iter()
        .map(|serial| {
            json!({
                "addresses": [ip(*serial)], "nodeName": "node-1", "zone": "us-west-2a",
                "conditions": {"ready": true, "serving": true, "terminating": false},
                "targetRef": {"kind": "Pod", "namespace": NAMESPACE, "name": format!("web-{n}-{serial}"), "uid": uid(3, n, *serial)},
            })
        })
        .collect()
}

/// A pod as a Deployment makes it, with a sidecar and its managed fields: about 6 KB.
fn pod(n: usize, serial: usize) -> Value {
    let ip = ip(serial);
    let container = |name: &str, port: u16| {
        json!({
            "name": name, "image": format!("registry.example.com/shop/{name}:1.27.4"), "imagePullPolicy": "IfNotPresent",
            "ports": [{"name": if name == "web" { "http" } else { "admin" }, "containerPort": port, "protocol": "TCP"}],
            "env": (0..8).map(|k| json!({"name": format!("SETTING_{k}"), "value": format!("a-value-of-some-length-{k}")})).collect::<Vec<_>>(),
            "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "256Mi"}},
            "readinessProbe": {"httpGet": {"path": "/healthz", "port": port, "scheme": "HTTP"}, "periodSeconds": 10,
                               "timeoutSeconds": 1, "successThreshold": 1, "failureThreshold": 3},
            "volumeMounts": [{"name": "token", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "readOnly": true}],
            "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
        })
    };
    let condition = |kind: &str| json!({"type": kind, "status": "True", "lastTransitionTime": TIME});
    let managed = |manager: &str, subresource: &str| {
        json!({"manager": manager, "operation": "Update", "apiVersion": "v1", "time": TIME, "fieldsType": "FieldsV1", "subresource": subresource,
               "fieldsV1": {"f:metadata": {"f:labels": {".": {}, "f:app": {}, "f:team": {}, "f:pod-template-hash": {}}, "f:ownerReferences": {".": {}}},
                            "f:spec": {"f:containers": {"k:{\"name\":\"web\"}": {".": {}, "f:env": {".": {}}, "f:image": {}, "f:name": {}, "f:ports": {}, "f:resources": {}}},
                                       "f:dnsPolicy": {}, "f:restartPolicy": {}, "f:schedulerName": {}, "f:securityContext": {}},
                            "f:status": {"f:conditions": {}, "f:containerStatuses": {}, "f:podIP": {}, "f:podIPs": {}, "f:startTime": {}}}})
    };
    let status = |name: &str| {
        json!({"name": name, "image": format!("registry.example.com/shop/{name}:1.27.4"), "ready": true, "started": true, "restartCount": 0,
               "imageID": format!("registry.example.com/shop/{name}@sha256:{:064x}", 7),
               "containerID": format!("containerd://{:064x}", serial), "state": {"running": {"startedAt": TIME}}})
    };
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": format!("web-{n}-{serial}"), "generateName": format!("web-{n}-"), "namespace": NAMESPACE, "uid": uid(3, n, serial),
            "creationTimestamp": TIME,
            "labels": {"app": format!("web-{n}"), "team": "shop", "tier": "frontend", "pod-template-hash": "6d4cf56db6",
                       "app.kubernetes.io/version": "1.27.4"},
            "annotations": {"prometheus.io/scrape": "true", "prometheus.io/port": "9102",
                            "kubectl.kubernetes.io/restartedAt": TIME},
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": format!("web-{n}-6d4cf56db6"), "uid": uid(4, n, 0),
                                 "controller": true, "blockOwnerDeletion": true}],
            "managedFields": [managed("kube-controller-manager", ""), managed("kubelet", "status")],
        },
        "spec": {
            "containers": [container("web", 8080), container("proxy", 9102)], "nodeName": "node-1", "restartPolicy": "Always",
            "serviceAccountName": "default", "serviceAccount": "default", "schedulerName": "default-scheduler", "dnsPolicy": "ClusterFirst",
            "securityContext": {}, "terminationGracePeriodSeconds": 30, "enableServiceLinks": true, "priority": 0,
            "volumes": [{"name": "token", "emptyDir": {}}],
            "tolerations": [{"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300},
                            {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}],
        },
        "status": {
            "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "hostIP": "192.168.0.10", "hostIPs": [{"ip": "192.168.0.10"}],
            "startTime": TIME, "qosClass": "Burstable",
            "conditions": [condition("PodScheduled"), condition("Initialized"), condition("PodReadyToStartContainers"),
                           condition("ContainersReady"), condition("Ready")],
            "containerStatuses": [status("web"), status("proxy")],
        },
    })
}
