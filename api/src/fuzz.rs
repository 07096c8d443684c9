//! Decoders of this crate against changed inputs.

use crate::arn::{ArnError, TargetGroupArn};
use crate::convert::convert;
use crate::crd::Version;
use crate::rules::{Context, Operation, Settings, check};
use crate::v1::TargetGroupBinding;
use serde_json::Value;
use tgb_fuzz::{fuzz, words};

const BINDINGS: [&[u8]; 3] = [
    br#"{"apiVersion":"elbv2.k8s.aws/v1","kind":"TargetGroupBinding","metadata":{"name":"web","namespace":"shop","annotations":{"elbv2.k8s.aws/paused":"true"}},"spec":{"targetGroup":{"arn":"arn:aws:elasticloadbalancing:eu-west-1:123456789012:targetgroup/web/1ce5b7da835c9ffb","targetType":"ip","ipAddressType":"ipv4","vpcID":"vpc-0123456789abcdef0","protocol":"HTTP","sharing":"Shared","assumeRole":{"roleARN":"arn:aws:iam::111122223333:role/a","externalID":"x"}},"serviceRef":{"name":"web","port":80},"nodeSelector":{"matchExpressions":[{"key":"a","operator":"In","values":["b"]}]},"networking":{"ingress":[{"from":[{"ipBlock":{"cidr":"10.0.0.0/8"}},{"securityGroup":{"groupID":"sg-0123456789abcdef0"}}],"ports":[{"protocol":"TCP","port":8080}]}]}},"status":{"observedGeneration":1,"targetGroupARN":"arn","conditions":[]}}"#,
    br#"{"apiVersion":"elbv2.k8s.aws/v1beta1","kind":"TargetGroupBinding","metadata":{"name":"web"},"spec":{"targetGroupARN":"arn:aws:elasticloadbalancing:eu-west-1:123456789012:targetgroup/web/1ce5b7da835c9ffb","targetType":"ip","targetGroupProtocol":"HTTP","ipAddressType":"ipv4","vpcID":"vpc-0123456789abcdef0","serviceRef":{"name":"web","port":"http"},"multiClusterTargetGroup":true,"iamRoleArnToAssume":"a","assumeRoleExternalId":"b","networking":{"ingress":[{"from":[{"ipBlock":{"cidr":"10.0.0.0/8"}}],"ports":[{"port":1}]}]}}}"#,
    br#"{"apiVersion":"elbv2.k8s.aws/v1alpha1","kind":"TargetGroupBinding","metadata":{"name":"web"},"spec":{"targetGroupARN":"a","serviceRef":{"name":"web","port":80}}}"#,
];
const WORDS: [&str; 16] = [
    "\"spec\":",
    "null",
    "{}",
    "[]",
    "\"\"",
    "\"targetGroup\":",
    "\"networking\":",
    "\"ingress\":",
    "\"from\":",
    "\"metadata\":",
    "\"annotations\":",
    "elbv2.k8s.aws/paused",
    "elbv2.k8s.aws/v1",
    "elbv2.k8s.aws/v1beta1",
    "1.5",
    "\u{0}",
];

#[test]
fn fuzz_arn() {
    let good = b"arn:aws:elasticloadbalancing:eu-west-1:123456789012:targetgroup/web/1ce5b7da835c9ffb";
    let parts =
        ["arn:", ":", "/", "targetgroup/", "loadbalancer/app/", "aws-cn", "elasticloadbalancing", "\u{e9}"];
    fuzz("arn", &[good], &parts, |input| match TargetGroupArn::parse(&String::from_utf8_lossy(input)) {
        Ok(arn) => {
            let whole = [arn.partition(), arn.region(), arn.account(), arn.name()];
            assert!(whole.iter().all(|part| !part.is_empty() && arn.as_str().contains(part)));
            "an ARN".to_owned()
        }
        Err(ArnError::OtherService(_)) => "another service".to_owned(),
        Err(error) => error.to_string(),
    });
}

#[test]
fn fuzz_convert() {
    fuzz("convert", &BINDINGS, &WORDS, |input| {
        let object = match serde_json::from_slice::<Value>(input) {
            Ok(object) => object,
            Err(error) => return words(&error.to_string()),
        };
        let mut all = String::new();
        for to in [Version::V1, Version::V1Beta1, Version::V1Alpha1] {
            match convert(object.clone(), to) {
                Ok(converted) => {
                    assert!(
                        convert(converted, Version::V1).is_ok(),
                        "converted once and not again: {object}"
                    );
                    all.push_str("ok ");
                }
                Err(error) => all.push_str(&words(&error.to_string())),
            }
        }
        all
    });
}

#[test]
fn fuzz_rules() {
    fuzz("rules", &BINDINGS, &WORDS, |input| {
        let binding = match serde_json::from_slice::<TargetGroupBinding>(input) {
            Ok(binding) => binding,
            Err(error) => return words(&error.to_string()),
        };
        let found = check(Operation::Create, &binding, None, &Context::default(), &Settings::default());
        for version in ["v1", "v1beta1", "v1alpha1"] {
            assert!(found.iter().all(|finding| !finding.in_version(version).is_empty()));
        }
        found.iter().map(|finding| finding.rule).collect::<Vec<_>>().join(" ")
    });
}
