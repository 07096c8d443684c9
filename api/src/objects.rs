//! Kubernetes' own objects, as far as anybody here reads them. `k8s-openapi`'s types read every field of a pod, which takes
//! most of the time and of the program; what is not read can't be of a wrong type either.
//!
//! Nothing is ever written back from these.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube_core::{ClusterResourceScope, NamespaceResourceScope};
use serde::{Deserialize, Deserializer};
use std::borrow::Cow;
use std::collections::BTreeMap;

/// Reads `metadata` without what nobody looks at: `managedFields` are often the larger half of an object.
///
/// # Errors
/// Where a value is of another type than Kubernetes'.
pub fn metadata<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ObjectMeta, D::Error> {
    #[derive(Default, Deserialize)]
    #[serde(rename_all = "camelCase", default)]
    struct Read {
        annotations: Option<BTreeMap<String, String>>,
        creation_timestamp: Option<Time>,
        deletion_timestamp: Option<Time>,
        finalizers: Option<Vec<String>>,
        generate_name: Option<String>,
        generation: Option<i64>,
        labels: Option<BTreeMap<String, String>>,
        name: Option<String>,
        namespace: Option<String>,
        resource_version: Option<String>,
        uid: Option<String>,
    }
    let read = Option::<Read>::deserialize(deserializer)?.unwrap_or_default();
    Ok(ObjectMeta {
        annotations: read.annotations,
        creation_timestamp: read.creation_timestamp,
        deletion_timestamp: read.deletion_timestamp,
        finalizers: read.finalizers,
        generate_name: read.generate_name,
        generation: read.generation,
        labels: read.labels,
        name: read.name,
        namespace: read.namespace,
        resource_version: read.resource_version,
        uid: read.uid,
        ..ObjectMeta::default()
    })
}

/// Objects and their parts: every field is absent, `null` or of its type.
macro_rules! parts {
    ($($(#[$about:meta])* $name:ident { $($(#[$more:meta])* $field:ident: $type:ty,)+ })+) => {$(
        $(#[$about])*
        #[derive(Debug, Clone, Default, PartialEq, Deserialize)]
        #[serde(rename_all = "camelCase", default)]
        pub struct $name {
            $(
                #[doc = concat!("`", stringify!($field), "` of Kubernetes' ", stringify!($name), ".")]
                $(#[$more])*
                pub $field: $type,
            )+
        }
    )+};
}

impl PodSpec {
    /// The containers that run beside each other, in the order in which Kubernetes looks for a named port: the containers,
    /// then the native sidecars.
    pub fn running_containers(&self) -> impl Iterator<Item = &Container> {
        let sidecars = self.init_containers.iter().flatten();
        let sidecars = sidecars.filter(|container| container.restart_policy.as_deref() == Some("Always"));
        self.containers.iter().flatten().chain(sidecars)
    }
}

macro_rules! resources {
    ($($name:ident: $scope:ty, $group:literal, $plural:literal;)+) => {$(
        impl kube_core::Resource for $name {
            type DynamicType = ();
            type Scope = $scope;

            fn kind(&(): &()) -> Cow<'_, str> {
                stringify!($name).into()
            }
            fn group(&(): &()) -> Cow<'_, str> {
                $group.into()
            }
            fn version(&(): &()) -> Cow<'_, str> {
                "v1".into()
            }
            fn plural(&(): &()) -> Cow<'_, str> {
                $plural.into()
            }
            fn meta(&self) -> &ObjectMeta {
                &self.metadata
            }
            fn meta_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    )+};
}

resources! {
    Pod: NamespaceResourceScope, "", "pods";
    Service: NamespaceResourceScope, "", "services";
    EndpointSlice: NamespaceResourceScope, "discovery.k8s.io", "endpointslices";
    Node: ClusterResourceScope, "", "nodes";
    Namespace: ClusterResourceScope, "", "namespaces";
}

parts! {
    /// A pod.
    Pod {
        #[serde(deserialize_with = "metadata")]
        metadata: ObjectMeta,
        spec: Option<PodSpec>,
        status: Option<PodStatus>,
    }

    /// What a pod is to be.
    PodSpec {
        node_name: Option<String>,
        containers: Option<Vec<Container>>,
        init_containers: Option<Vec<Container>>,
        readiness_gates: Option<Vec<PodReadinessGate>>,
    }

    /// A container of a pod.
    Container {
        env: Option<Vec<EnvVar>>,
        ports: Option<Vec<ContainerPort>>,
        restart_policy: Option<String>,
    }

    /// An environment variable of a container.
    EnvVar {
        name: String,
        value: Option<String>,
    }

    /// A port of a container.
    ContainerPort {
        name: Option<String>,
        container_port: Option<i32>,
        protocol: Option<String>,
    }

    /// A readiness gate of a pod.
    PodReadinessGate {
        condition_type: String,
    }

    /// What a pod is.
    PodStatus {
        phase: Option<String>,
        #[serde(rename = "podIP")]
        pod_ip: Option<String>,
        #[serde(rename = "podIPs")]
        pod_ips: Option<Vec<PodIp>>,
        conditions: Option<Vec<StateCondition>>,
    }

    /// An address of a pod.
    PodIp {
        ip: Option<String>,
    }

    /// A condition of a pod or of a node.
    StateCondition {
        #[serde(rename = "type")]
        type_: String,
        status: String,
        reason: Option<String>,
        message: Option<String>,
    }

    /// A Service.
    Service {
        #[serde(deserialize_with = "metadata")]
        metadata: ObjectMeta,
        spec: Option<ServiceSpec>,
    }

    /// What a Service is to be.
    ServiceSpec {
        #[serde(rename = "type")]
        type_: Option<String>,
        #[serde(rename = "clusterIP")]
        cluster_ip: Option<String>,
        ports: Option<Vec<ServicePort>>,
        selector: Option<BTreeMap<String, String>>,
        ip_families: Option<Vec<String>>,
        health_check_node_port: Option<i32>,
        allocate_load_balancer_node_ports: Option<bool>,
    }

    /// A port of a Service.
    ServicePort {
        name: Option<String>,
        port: Option<i32>,
        protocol: Option<String>,
        target_port: Option<IntOrString>,
        node_port: Option<i32>,
    }

    /// An EndpointSlice.
    EndpointSlice {
        #[serde(deserialize_with = "metadata")]
        metadata: ObjectMeta,
        address_type: String,
        ports: Option<Vec<EndpointPort>>,
        endpoints: Option<Vec<Endpoint>>,
    }

    /// A port of an EndpointSlice.
    EndpointPort {
        name: Option<String>,
        port: Option<i32>,
        protocol: Option<String>,
    }

    /// An endpoint of an EndpointSlice.
    Endpoint {
        addresses: Option<Vec<String>>,
        conditions: Option<EndpointConditions>,
        node_name: Option<String>,
        target_ref: Option<ObjectReference>,
    }

    /// The state of an endpoint.
    EndpointConditions {
        ready: Option<bool>,
    }

    /// What an endpoint stands for.
    ObjectReference {
        kind: Option<String>,
        name: Option<String>,
    }

    /// A node.
    Node {
        #[serde(deserialize_with = "metadata")]
        metadata: ObjectMeta,
        spec: Option<NodeSpec>,
        status: Option<NodeStatus>,
    }

    /// What a node is to be.
    NodeSpec {
        #[serde(rename = "providerID")]
        provider_id: Option<String>,
        taints: Option<Vec<Taint>>,
    }

    /// A taint of a node.
    Taint {
        key: String,
        effect: String,
    }

    /// What a node is.
    NodeStatus {
        conditions: Option<Vec<StateCondition>>,
        addresses: Option<Vec<NodeAddress>>,
    }

    /// An address of a node.
    NodeAddress {
        #[serde(rename = "type")]
        type_: String,
        address: String,
    }

    /// A namespace.
    Namespace {
        #[serde(deserialize_with = "metadata")]
        metadata: ObjectMeta,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1 as whole;
    use serde_json::{from_value, json, to_value};

    #[test]
    fn a_pod_is_read_as_far_as_it_is_looked_at() {
        let pod: Pod = from_value(json!({
            "metadata": {"name": "web-1", "namespace": "shop", "labels": {"app": "web"}, "ownerReferences": [{"name": "x"}],
                         "managedFields": [{"manager": "m", "fieldsV1": {"f:spec": {}}}], "deletionTimestamp": "2026-01-02T03:04:05Z"},
            "spec": {"nodeName": "n1", "volumes": [{"name": "v"}], "readinessGates": null,
                     "containers": [{"name": "web", "ports": [{"containerPort": 8080, "name": "http"}], "env": [{"name": "A"}]}]},
            "status": {"podIPs": [{"ip": "10.0.0.1"}], "conditions": [{"type": "Ready", "status": "True"}]},
        }))
        .unwrap();
        assert_eq!(pod.metadata.name.as_deref(), Some("web-1"));
        assert!(pod.metadata.deletion_timestamp.is_some() && pod.metadata.managed_fields.is_none());
        let (spec, status) = (pod.spec.unwrap(), pod.status.unwrap());
        let port = spec.containers.unwrap()[0].ports.clone().unwrap()[0].clone();
        assert_eq!((spec.node_name.as_deref(), port.container_port), (Some("n1"), Some(8080)));
        assert_eq!(status.pod_ips.unwrap()[0].ip.as_deref(), Some("10.0.0.1"));
        assert_eq!(status.conditions.unwrap()[0].status, "True");
    }

    #[test]
    fn names_are_those_of_kubernetes() {
        let service = whole::ServiceSpec {
            type_: Some("LoadBalancer".to_owned()),
            cluster_ip: Some("None".to_owned()),
            ip_families: Some(vec!["IPv4".to_owned()]),
            health_check_node_port: Some(1),
            allocate_load_balancer_node_ports: Some(false),
            ports: Some(vec![whole::ServicePort { node_port: Some(2), port: 3, ..Default::default() }]),
            ..Default::default()
        };
        let read: ServiceSpec = from_value(to_value(service).unwrap()).unwrap();
        let wanted = ServiceSpec {
            type_: Some("LoadBalancer".to_owned()),
            cluster_ip: Some("None".to_owned()),
            ip_families: Some(vec!["IPv4".to_owned()]),
            health_check_node_port: Some(1),
            allocate_load_balancer_node_ports: Some(false),
            ports: Some(vec![ServicePort { node_port: Some(2), port: Some(3), ..Default::default() }]),
            selector: None,
        };
        assert_eq!(read, wanted);
        let node = whole::NodeSpec { provider_id: Some("aws:///a/i-1".to_owned()), ..Default::default() };
        let read: NodeSpec = from_value(to_value(node).unwrap()).unwrap();
        assert_eq!(read.provider_id.as_deref(), Some("aws:///a/i-1"));
        fn path<K: kube_core::Resource<DynamicType = ()>>() -> String {
            K::url_path(&(), None)
        }
        let same = [
            (path::<Pod>(), path::<whole::Pod>()),
            (path::<Service>(), path::<whole::Service>()),
            (path::<EndpointSlice>(), path::<k8s_openapi::api::discovery::v1::EndpointSlice>()),
            (path::<Node>(), path::<whole::Node>()),
            (path::<Namespace>(), path::<whole::Namespace>()),
        ];
        for (ours, theirs) in same {
            assert_eq!(ours, theirs);
        }
    }
}
