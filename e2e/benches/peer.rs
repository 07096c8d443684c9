//! The AWS Load Balancer Controller, from `PEER=<path of its binary>`: started with the flags, definitions and webhooks that
//! its chart gives it, as far as they concern TargetGroupBinding.

use crate::http::Place;
use crate::stage::Program;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tgb_e2e::{Aws, CLUSTER_NAME, Cluster, Result, Spec, free_ports};

/// The counterpart of our flag: its own limits of AWS calls, per second and at once.
pub(crate) const NO_LIMITS: &str = "--aws-api-throttle=Elastic Load Balancing v2:.*=400:400";
/// Its paths of admission, mutating and validating.
pub(crate) const ADMISSION: [&str; 2] = [
    "/mutate-elbv2-k8s-aws-v1beta1-targetgroupbinding?timeout=10s",
    "/validate-elbv2-k8s-aws-v1beta1-targetgroupbinding?timeout=10s",
];
const NAME: &str = "peer";
const NAMESPACE: &str = "kube-system";
const LEASE: &str = "aws-load-balancer-controller-leader";

/// The binary, if there is one to measure.
pub(crate) fn path() -> Option<PathBuf> {
    std::env::var_os("PEER").filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// How it runs.
#[derive(Debug)]
pub(crate) struct Peer {
    /// The binary.
    pub path: PathBuf,
    probes: String,
    webhook: u16,
    /// Of its webhook, PEM.
    certificate: String,
}

impl Peer {
    /// Starts it; it is not ready yet.
    pub(crate) fn start(cluster: &Cluster, aws: &Aws) -> Result<Self> {
        let said = |error: &dyn std::fmt::Display| error.to_string();
        let path = path().ok_or("PEER is not set")?;
        let definitions = Path::new(env!("CARGO_MANIFEST_DIR")).join("lbc/crds/crds.yaml");
        cluster.kubectl(&["apply", "-f", &definitions.display().to_string()]).ok()?;
        cluster.kubectl_with(&["apply", "-f", "-"], &ingress_class_params().to_string()).ok()?;
        cluster.kubectl(&["wait", "--for=condition=Established", "crd", "--all", "--timeout=30s"]).ok()?;

        let pair = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).map_err(|e| said(&e))?;
        let dir = cluster.dir().join("peer-certificate");
        std::fs::create_dir_all(&dir).map_err(|error| said(&error))?;
        for (name, text) in [("tls.crt", pair.cert.pem()), ("tls.key", pair.signing_key.serialize_pem())] {
            std::fs::write(dir.join(name), text).map_err(|error| said(&error))?;
        }

        let [probes, webhook, metrics] = free_ports()?;
        let peer =
            Self { path, probes: format!("127.0.0.1:{probes}"), webhook, certificate: pair.cert.pem() };
        let url = aws.endpoint();
        // The names of services changed with its AWS SDK, in 2.10; it passes over those that it does not know.
        let endpoints = ["elasticloadbalancing", "Elastic Load Balancing v2", "ec2", "EC2", "sts", "STS"];
        let flags = [
            format!("--kubeconfig={}", cluster.kubeconfig().display()),
            format!("--cluster-name={CLUSTER_NAME}"),
            "--aws-region=us-west-2".to_owned(),
            format!("--aws-vpc-id={}", aws.lab().vpc),
            format!("--aws-api-endpoints={}", endpoints.map(|name| format!("{name}={url}")).join(",")),
            format!("--webhook-cert-dir={}", dir.display()),
            "--enable-leader-election=true".to_owned(),
            format!("--leader-election-namespace={NAMESPACE}"),
            "--enable-shield=false".to_owned(),
            "--enable-waf=false".to_owned(),
            "--enable-wafv2=false".to_owned(),
            "--log-level=info".to_owned(),
        ];
        let spec = peer.flags(Spec::new(&peer.path, flags), &peer.probes, webhook, metrics);
        let spec =
            aws.environment("PEER").into_iter().fold(spec, |spec, (name, value)| spec.env(&name, value));
        cluster.processes().spawn(NAME, spec)?;
        peer.publish(cluster, webhook)?;
        Ok(peer)
    }

    /// The program.
    pub(crate) fn program(&self) -> Program<'_> {
        Program { name: NAME, probes: &self.probes }
    }

    /// Where it answers admission reviews.
    pub(crate) fn place(&self) -> Result<Place> {
        Place::tls(&format!("127.0.0.1:{}", self.webhook), &self.certificate, None)
    }

    /// The flags with its ports.
    pub(crate) fn flags(&self, spec: Spec, probes: &str, webhook: u16, metrics: u16) -> Spec {
        spec.flag(&format!("--health-probe-bind-addr={probes}"))
            .flag(&format!("--webhook-bind-port={webhook}"))
            .flag(&format!("--metrics-bind-addr=127.0.0.1:{metrics}"))
    }

    /// Tells the API server where its webhook is.
    pub(crate) fn publish(&self, cluster: &Cluster, port: u16) -> Result<()> {
        let kinds = [("Mutating", "mtargetgroupbinding"), ("Validating", "vtargetgroupbinding")];
        let configurations: Vec<Value> = kinds
            .iter()
            .zip(ADMISSION)
            .map(|((kind, name), path)| {
                let path = path.split('?').next().unwrap_or_default();
                json!({
                    "apiVersion": "admissionregistration.k8s.io/v1", "kind": format!("{kind}WebhookConfiguration"),
                    "metadata": {"name": "aws-load-balancer-webhook"},
                    "webhooks": [{
                        "name": format!("{name}.elbv2.k8s.aws"), "admissionReviewVersions": ["v1"],
                        "clientConfig": {"url": format!("https://127.0.0.1:{port}{path}"),
                                         "caBundle": BASE64.encode(&self.certificate)},
                        "failurePolicy": "Fail", "sideEffects": "None",
                        "rules": [{"apiGroups": ["elbv2.k8s.aws"], "apiVersions": ["v1beta1"],
                                   "operations": ["CREATE", "UPDATE"], "resources": ["targetgroupbindings"]}],
                    }],
                })
            })
            .collect();
        let list = json!({"apiVersion": "v1", "kind": "List", "items": configurations});
        cluster.kubectl_with(&["apply", "-f", "-"], &list.to_string()).ok().map(drop)
    }

    /// Who leads, or led last; empty if nobody did.
    pub(crate) fn leader(&self, cluster: &Cluster) -> String {
        let holder = "jsonpath={.spec.holderIdentity}";
        cluster.kubectl(&["-n", NAMESPACE, "get", "lease", LEASE, "-o", holder]).ok().unwrap_or_default()
    }
}

/// It watches these, too, and does not begin without their definition.
fn ingress_class_params() -> Value {
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "ingressclassparams.elbv2.k8s.aws"},
        "spec": {
            "group": "elbv2.k8s.aws", "scope": "Cluster",
            "names": {"kind": "IngressClassParams", "listKind": "IngressClassParamsList",
                      "plural": "ingressclassparams", "singular": "ingressclassparams"},
            "versions": [{"name": "v1beta1", "served": true, "storage": true,
                          "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}],
        },
    })
}
