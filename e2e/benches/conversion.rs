//! What a conversion costs beside reading and printing the same bytes: ratios in one run, since absolute times move from
//! machine to machine. Prints a table and writes `target/bench.json`.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use serde_json::{Value, json};
use std::hint::black_box;
use std::time::{Duration, Instant};
use tgb_api::convert::convert_objects;

/// A binding as clusters have them: about 3 KB with its managed fields.
fn binding(n: usize) -> Value {
    let owners: Vec<Value> = (0..4)
        .map(|manager| {
            json!({"manager": format!("manager-{manager}"), "operation": "Update", "apiVersion": "elbv2.k8s.aws/v1beta1",
                   "time": "2026-01-01T00:00:00Z", "fieldsType": "FieldsV1",
                   "fieldsV1": {"f:spec": {"f:serviceRef": {"f:name": {}, "f:port": {}}, "f:targetGroupARN": {}, "f:targetType": {},
                                           "f:networking": {"f:ingress": {}}}}})
        })
        .collect();
    let peers: Vec<Value> = (0..6).map(|k| json!({"ipBlock": {"cidr": format!("10.{k}.0.0/16")}})).collect();
    json!({
        "apiVersion": "elbv2.k8s.aws/v1beta1", "kind": "TargetGroupBinding",
        "metadata": {"name": format!("web-{n}"), "namespace": "shop", "uid": format!("00000000-0000-0000-0000-{n:012}"),
                     "labels": {"app": "web", "team": "shop"}, "managedFields": owners},
        "spec": {"targetGroupARN": "arn:aws:elasticloadbalancing:eu-west-1:123456789012:targetgroup/web/1ce5b7da835c9ffb",
                 "targetType": "ip", "targetGroupProtocol": "HTTP", "ipAddressType": "ipv4", "vpcID": "vpc-0123456789abcdef0",
                 "serviceRef": {"name": "web", "port": 80},
                 "networking": {"ingress": [{"from": peers, "ports": [{"protocol": "TCP", "port": 8080}]}]}},
        "status": {"observedGeneration": 3},
    })
}

/// The shortest time of a run of `work`, of some: what else the machine does only ever adds.
fn shortest(runs: usize, mut work: impl FnMut()) -> Duration {
    let timed = (0..runs).map(|_| {
        let start = Instant::now();
        work();
        start.elapsed()
    });
    timed.min().unwrap_or_default()
}

fn review(objects: &[Value], desired: &str) -> Vec<u8> {
    serde_json::to_vec(&json!({"request": {"uid": "u", "desiredAPIVersion": desired, "objects": objects}}))
        .unwrap()
}

fn convert(body: &[u8]) -> Vec<u8> {
    let mut review: Value = serde_json::from_slice(body).unwrap();
    let Value::Array(objects) = review["request"]["objects"].take() else { return Vec::new() };
    let desired = review["request"]["desiredAPIVersion"].as_str().unwrap_or_default();
    serde_json::to_vec(&convert_objects(objects, desired).unwrap()).unwrap()
}

fn parse_and_print(body: &[u8]) -> Vec<u8> {
    serde_json::to_vec(&serde_json::from_slice::<Value>(body).unwrap()).unwrap()
}

fn main() {
    let mut rows = Vec::new();
    for (what, count, desired) in [
        ("one object, v1beta1 to v1", 1, "elbv2.k8s.aws/v1"),
        ("one object, v1beta1 to v1alpha1", 1, "elbv2.k8s.aws/v1alpha1"),
        ("5,000 objects in one review, v1beta1 to v1", 5_000, "elbv2.k8s.aws/v1"),
    ] {
        let objects: Vec<Value> = (0..count).map(binding).collect();
        let body = review(&objects, desired);
        let (inner, runs) = if count == 1 { (200, 50) } else { (1, 10) };
        let each = |work: fn(&[u8]) -> Vec<u8>| {
            let all = shortest(runs, || (0..inner).for_each(|_| drop(black_box(work(black_box(&body))))));
            all.as_secs_f64() * 1e6 / f64::from(inner)
        };
        let (ours, floor) = (each(convert), each(parse_and_print));
        rows.push(json!({"what": what, "bytes": body.len(), "microseconds": ours, "parse_and_print_microseconds": floor,
                         "ratio": ours / floor}));
    }
    println!(
        "{:<46} {:>9} {:>12} {:>15} {:>6}",
        "conversion", "bytes", "ours, µs", "parse+print, µs", "ratio"
    );
    for row in &rows {
        println!(
            "{:<46} {:>9} {:>12.1} {:>15.1} {:>6.2}",
            row["what"].as_str().unwrap_or_default(),
            row["bytes"],
            row["microseconds"].as_f64().unwrap_or_default(),
            row["parse_and_print_microseconds"].as_f64().unwrap_or_default(),
            row["ratio"].as_f64().unwrap_or_default(),
        );
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bench.json");
    if let Err(error) = std::fs::write(path, format!("{:#}\n", json!({"conversion": rows}))) {
        eprintln!("target/bench.json was not written: {error}");
    }
}
