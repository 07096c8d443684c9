//! Decoders of this program against changed inputs.

use crate::admission::Request;
use crate::{convert, rewrite};
use tgb_api::v1::TargetGroupBinding;
use tgb_fuzz::{fuzz, words};

const ADMISSION: &[u8] = br#"{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"u1","kind":{"group":"elbv2.k8s.aws","version":"v1","kind":"TargetGroupBinding"},"requestKind":{"version":"v1beta1"},"name":"web","namespace":"shop","operation":"UPDATE","userInfo":{},"object":{"metadata":{"name":"web","generateName":"w-"},"spec":{"targetGroup":{"arn":"a","targetType":"ip"},"serviceRef":{"name":"web","port":80}}},"oldObject":null,"dryRun":false}}"#;
const CONVERSION: &[u8] = br#"{"apiVersion":"apiextensions.k8s.io/v1","kind":"ConversionReview","request":{"uid":"u1","desiredAPIVersion":"elbv2.k8s.aws/v1","objects":[{"apiVersion":"elbv2.k8s.aws/v1beta1","kind":"TargetGroupBinding","metadata":{"name":"web"},"spec":{"targetGroupARN":"a","serviceRef":{"name":"web","port":80}}}]}}"#;
const WORDS: [&str; 10] = [
    "null",
    "{}",
    "[]",
    "\"request\":",
    "\"objects\":",
    "\"uid\":",
    "\"object\":",
    "\\ud800",
    "elbv2.k8s.aws/v1alpha1",
    "\"spec\":",
];

#[test]
fn fuzz_admission_review() {
    fuzz("admission-review", &[ADMISSION], &WORDS, |input| match Request::read(input) {
        Ok((request, objects)) => {
            let _ = (request.operation(), request.namespace(), request.name(), request.user_version());
            // Whether its objects are bindings or not, it is the same review.
            let read = Request::read_bindings(input).ok();
            let there = read.map(|(_, bindings)| (bindings.new.is_some(), bindings.old.is_some()));
            assert_eq!(there, Some((objects.new.is_some(), objects.old.is_some())));
            (objects.new.is_some(), objects.old.is_some(), String::new())
        }
        Err(message) => (false, false, words(&message)),
    });
}

#[test]
fn fuzz_conversion_review() {
    fuzz("conversion-review", &[CONVERSION], &WORDS, |input| {
        match convert::review(&axum::body::Bytes::copy_from_slice(input)) {
            Ok(_) => String::new(),
            Err(message) => words(&message),
        }
    });
}

#[test]
fn fuzz_yaml() {
    let manifest = b"# why\n%YAML 1.2\n---\napiVersion: elbv2.k8s.aws/v1beta1\nkind: TargetGroupBinding\nmetadata: {name: web, labels: &a {b: 'c'}}\nspec:\n  targetGroupARN: |\n    arn\n  serviceRef: {name: web, port: 80}\n  x: *a\n---\n{\"kind\": \"Service\", \"spec\": {\"ports\": [{\"port\": 0x50}]}}\n...\n- ? a\n  : !!int 1\n";
    let parts = [
        "---\n",
        "...\n",
        "&a ",
        "*a",
        "<<: *a",
        "!!binary ",
        "|\n  ",
        ">-\n ",
        "\t",
        "? ",
        ": ",
        "- ",
        "#",
        "\u{feff}",
        "%TAG ! x\n",
        "\r",
        "{{ x }}",
        "&a [*a,*a]",
    ];
    fuzz("yaml", &[manifest], &parts, |input| {
        let text = String::from_utf8_lossy(input);
        let documents = rewrite::documents(&text);
        assert_eq!(documents.iter().map(|document| document.text).collect::<String>(), text);
        let mut said = String::new();
        for document in documents.iter().take(20) {
            match document.parse() {
                Ok(Some(node)) => {
                    said.push_str(if node.value.value().is_object() { "object " } else { "value " })
                }
                Ok(None) => said.push_str("none "),
                Err(unusable) => said.push_str(&words(&unusable.message)),
            }
        }
        said.chars().take(200).collect::<String>()
    });
}

#[test]
fn fuzz_binding() {
    let object = br#"{"metadata":{"name":"web"},"spec":{"targetGroup":{"arn":"a","targetType":"ip"},"serviceRef":{"name":"web","port":80}}}"#;
    fuzz("binding", &[object], &WORDS, |input| match serde_json::from_slice::<TargetGroupBinding>(input) {
        Ok(_) => String::new(),
        Err(error) => words(&error.to_string()),
    });
}
