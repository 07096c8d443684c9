//! The webhook's figures, over real TLS connections to the real process.

use crate::controller::settled;
use crate::fleet::{self, Fleet};
use crate::floor::Floor;
use crate::http::Place;
use crate::stage::{Program, Stage};
use crate::table::{Limit, Side, Table};
use crate::{machine, peer};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use futures::future::try_join_all;
use serde_json::{Value, json};
use std::hint::black_box;
use std::time::{Duration, Instant};
use tgb_e2e::Result;

const JSON: &str = "application/json";
/// Our paths of admission, mutating and validating.
const ADMISSION: [&str; 2] = [
    "/mutate-elbv2-k8s-aws-targetgroupbinding?timeout=10s",
    "/validate-elbv2-k8s-aws-targetgroupbinding?timeout=10s",
];

/// Measures and adds the rows.
pub(crate) async fn run(table: &mut Table) -> Result<()> {
    let stage = Stage::start(table.side, &[])?;
    measure(table, &stage).await.map_err(|error| stage.explain(error))
}

async fn measure(table: &mut Table, stage: &Stage) -> Result<()> {
    let webhook = stage.webhook();
    let mut fleet = Fleet::new(stage).await?;
    fleet.target_groups(&stage.aws, 100)?;
    fleet.bindings(0..100, 2).await?;
    let place = place(stage)?;
    // The peer's one program has the new bindings to do, too.
    let server = stage.aws.server().ok_or("this needs awsim")?;
    settled(server, Duration::from_secs(3), Duration::from_secs(180)).await?;

    let floor = Floor::start()?;
    admission(table, stage, &place, &floor, &fleet).await?;
    if table.side == Side::Ours {
        conversion(table, stage, &place, &floor).await?;
    }
    drop(floor);
    start(table, stage, "start-webhook", webhook, 200.0)?;
    if table.side == Side::Peer {
        return Ok(());
    }
    // As it stands after its start and some traffic, with everything cached.
    let mut connection = place.connect().await?;
    let body = review(&fleet, 7);
    for _ in 0..500 {
        connection.send("POST", ADMISSION[1], JSON, body.clone()).await?;
    }
    let small = stage.memory(webhook).0;
    table.add(
        "memory-webhook",
        "memory, 100 bindings, 200 pods: webhook",
        small / 1e6,
        "MB",
        Limit::Most(20.0),
    );
    fleet.target_groups(&stage.aws, 2_000)?;
    fleet.bindings(100..2_000, 0).await?;
    stage.restart(webhook)?;
    let mut connection = place.connect().await?;
    for _ in 0..500 {
        connection.send("POST", ADMISSION[1], JSON, body.clone()).await?;
    }
    let each = (stage.memory(webhook).0 - small) / 1_900.0 / 1e3;
    table.add(
        "memory-webhook-binding",
        "memory per binding and its Service cached: webhook",
        each,
        "kB",
        Limit::Most(4.0),
    );
    Ok(())
}

/// Where the webhook is, with the authority that it published.
fn place(stage: &Stage) -> Result<Place> {
    if let Some(peer) = stage.peer() {
        return peer.place();
    }
    let args = ["get", "validatingwebhookconfigurations", "-o", "json"];
    let all = stage.cluster.kubectl(&args).json()?;
    let items = all["items"].as_array().cloned().unwrap_or_default();
    let bundle = items.iter().find_map(|item| item["webhooks"][0]["clientConfig"]["caBundle"].as_str());
    let pem = BASE64.decode(bundle.ok_or("no caBundle is published")?).map_err(|error| error.to_string())?;
    let spec = stage.cluster.processes().spec(stage.webhook().name).ok_or("no webhook")?;
    let address = spec.value("--listen").ok_or("no address")?;
    Place::tls(address, &String::from_utf8_lossy(&pem), None)
}

/// The update of a binding whose networking changes: 3 KB.
fn review(fleet: &Fleet, n: usize) -> Bytes {
    let object = |peers: usize| {
        let mut object = fleet.binding(n);
        let peers: Vec<Value> =
            (0..peers).map(|k| json!({"ipBlock": {"cidr": format!("10.{k}.0.0/16")}})).collect();
        object["spec"]["networking"] =
            json!({"ingress": [{"from": peers, "ports": [{"protocol": "TCP", "port": 8080}]}]});
        object
    };
    let version = fleet.version();
    let resource = json!({"group": "elbv2.k8s.aws", "version": version, "resource": "targetgroupbindings"});
    let kind = json!({"group": "elbv2.k8s.aws", "version": version, "kind": "TargetGroupBinding"});
    let review = json!({
        "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
        "request": {
            "uid": format!("00000000-0000-4000-8000-{n:012}"), "kind": kind, "requestKind": kind, "resource": resource,
            "requestResource": resource, "name": format!("web-{n}"), "namespace": fleet::NAMESPACE, "operation": "UPDATE",
            "userInfo": {"username": "admin", "groups": ["system:masters", "system:authenticated"]},
            "object": object(7), "oldObject": object(6), "dryRun": false,
            "options": {"kind": "UpdateOptions", "apiVersion": "meta.k8s.io/v1", "fieldManager": "kubectl-client-side-apply"},
        },
    });
    Bytes::from(review.to_string())
}

/// What requests one after another cost, µs: the webhook's of `count` on one connection, the floor's of as many with the
/// same bodies, and the seconds that the webhook's took. Both in turn, so that whatever else runs is beside both.
async fn costs(
    pid: u32,
    place: &Place,
    floor: &Floor,
    count: usize,
    request: impl Fn(usize) -> (&'static str, Bytes),
) -> Result<(f64, f64, f64)> {
    let (mut ours, mut theirs) = (place.connect().await?, floor.place.connect().await?);
    let (path, body) = request(0);
    let (_, answer) = ours.send("POST", path, JSON, body).await?;
    let bytes = format!("/{}", answer.len());
    let (mut costs, mut floors, mut times) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..7 {
        let (before, begun) = (machine::cpu(pid), Instant::now());
        for n in 0..count {
            let (path, body) = request(n);
            ours.send("POST", path, JSON, body).await?;
        }
        let (cost, time) = (machine::cpu(pid) - before, begun.elapsed());
        let before = floor.cpu();
        for n in 0..count {
            theirs.send("POST", &bytes, JSON, request(n).1).await?;
        }
        // the first round fills what is filled once
        if round > 0 {
            costs.push(cost.as_secs_f64() * 1e6 / count as f64);
            floors.push((floor.cpu() - before).as_secs_f64() * 1e6 / count as f64);
            times.push(time.as_secs_f64());
        }
    }
    let middle = |values: &mut [f64]| machine::quantile(values, 0.5);
    Ok((middle(&mut costs), middle(&mut floors), middle(&mut times)))
}

/// What requests on 8 connections at once cost, µs, and how long each took, ms; `count` on each.
async fn side_by_side(
    pid: u32,
    place: &Place,
    count: usize,
    request: impl Fn(usize) -> (&'static str, Bytes),
) -> Result<(f64, Vec<f64>)> {
    const CONNECTIONS: usize = 8;
    let request = &request;
    let before = machine::cpu(pid);
    let clients = (0..CONNECTIONS).map(|client| async move {
        let mut connection = place.connect().await?;
        let mut times = Vec::new();
        for n in 0..count {
            let (path, body) = request(2 * client + n);
            let begun = Instant::now();
            connection.send("POST", path, JSON, body).await?;
            times.push(begun.elapsed().as_secs_f64() * 1e3);
        }
        Ok::<_, String>(times)
    });
    let times: Vec<f64> = try_join_all(clients).await?.into_iter().flatten().collect();
    Ok(((machine::cpu(pid) - before).as_secs_f64() * 1e6 / times.len() as f64, times))
}

fn beside(table: &mut Table, id: &str, what: &str, (ours, floor): (f64, f64), most: f64) {
    table.add(id, &format!("{what}, CPU"), ours, "µs", Limit::Most(most));
    if table.side == Side::Peer {
        return;
    }
    let nothing = "a server that reads the same bytes over TLS, answers as many and does nothing else, CPU";
    table.add(&format!("{id}-floor"), nothing, floor, "µs", Limit::None);
    table.add(&format!("{id}-ratio"), "ours in that", 100.0 * ours / floor, "%", Limit::None);
}

async fn admission(
    table: &mut Table,
    stage: &Stage,
    place: &Place,
    floor: &Floor,
    fleet: &Fleet,
) -> Result<()> {
    let pid = stage.pid(stage.webhook().name);
    let [mutate, validate] = if table.side == Side::Ours { ADMISSION } else { peer::ADMISSION };
    let bodies: Vec<Bytes> = (0..100).map(|n| review(fleet, n)).collect();
    let mut connection = place.connect().await?;
    let (_, answer) = connection.send("POST", mutate, JSON, bodies[0].clone()).await?;
    let answer: Value = serde_json::from_slice(&answer).map_err(|error| error.to_string())?;
    if answer["response"]["allowed"] != true || !answer["response"]["warnings"].is_null() {
        return Err(format!("an update that is fine is not: {answer}"));
    }
    let request =
        |n: usize| (if n.is_multiple_of(2) { mutate } else { validate }, bodies[n / 2 % 100].clone());
    let (ours, least, _) = costs(pid, place, floor, 2_000, request).await?;
    let what = format!("one admission request (update of a binding, {} bytes)", bodies[0].len());
    beside(table, "admission-cpu", &what, (ours, least), 50.0);

    let (cost, mut times) = side_by_side(pid, place, 1_500, request).await?;
    table.add("admission-cpu-8", "the same at 8 connections, CPU", cost, "µs", Limit::Most(50.0));
    table.add(
        "admission-p50",
        "the same at 8 connections, median",
        machine::quantile(&mut times, 0.5),
        "ms",
        Limit::None,
    );
    table.add(
        "admission-p99",
        "the same at 8 connections, p99",
        machine::quantile(&mut times, 0.99),
        "ms",
        Limit::Most(3.0),
    );
    Ok(())
}

/// A binding as clusters have them: about 2 KB with its managed fields.
fn old_binding(n: usize) -> Value {
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

fn conversion_review(objects: &[Value]) -> Bytes {
    let review = json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "ConversionReview",
        "request": {"uid": "00000000-0000-4000-8000-000000000000", "desiredAPIVersion": "elbv2.k8s.aws/v1", "objects": objects},
    });
    Bytes::from(review.to_string())
}

async fn conversion(table: &mut Table, stage: &Stage, place: &Place, floor: &Floor) -> Result<()> {
    let pid = stage.pid(stage.webhook().name);
    let mut connection = place.connect().await?;
    let bodies: Vec<Bytes> = (0..100).map(|n| conversion_review(&[old_binding(n)])).collect();
    let (status, answer) = connection.send("POST", "/convert", JSON, bodies[0].clone()).await?;
    let answer: Value = serde_json::from_slice(&answer).map_err(|error| format!("HTTP {status}: {error}"))?;
    if answer["response"]["convertedObjects"][0]["spec"]["targetGroup"]["targetType"] != "ip" {
        return Err(format!("a conversion went wrong: {answer}"));
    }
    let request = |n: usize| ("/convert", bodies[n % 100].clone());
    let (ours, least, time) = costs(pid, place, floor, 5_000, request).await?;
    let what = format!("conversion of one object per review ({} bytes)", bodies[0].len());
    beside(table, "conversion-cpu", &what, (ours, least), 40.0);
    let (cost, _) = side_by_side(pid, place, 1_500, request).await?;
    table.add("conversion-cpu-8", "the same at 8 connections, CPU", cost, "µs", Limit::Most(40.0));
    let what = "5,000 such reviews one after another on one connection";
    table.add("conversion-5000", what, time, "s", Limit::Most(2.0));

    let objects: Vec<Value> = (0..5_000).map(old_binding).collect();
    let body = conversion_review(&objects);
    let floor = (0..10).map(|_| {
        let begun = Instant::now();
        let value: Value = serde_json::from_slice(black_box(&body)).unwrap();
        black_box(serde_json::to_vec(&value).unwrap());
        begun.elapsed()
    });
    let floor = floor.min().unwrap_or_default();
    let mut ours = Duration::MAX;
    let mut connection = place.connect().await?;
    for _ in 0..10 {
        let before = machine::cpu(pid);
        let (status, _) = connection.send("POST", "/convert", JSON, body.clone()).await?;
        if status != 200 {
            return Err(format!("a review of 5,000 objects: HTTP {status}"));
        }
        ours = ours.min(machine::cpu(pid) - before);
    }
    let what = format!("5,000 objects in one review ({:.1} MB), CPU", body.len() as f64 / 1e6);
    table.add("conversion-list-cpu", &what, ours.as_secs_f64() * 1e3, "ms", Limit::None);
    let what = "parse and print of the same bytes as serde_json::Value, in its share of that";
    table.add(
        "conversion-list",
        what,
        100.0 * floor.as_secs_f64() / ours.as_secs_f64(),
        "%",
        Limit::Least(50.0),
    );
    Ok(())
}

/// From the start of a program to its `/readyz`.
pub(crate) fn start(
    table: &mut Table,
    stage: &Stage,
    id: &str,
    program: Program<'_>,
    most: f64,
) -> Result<()> {
    let mut times = Vec::new();
    for _ in 0..5 {
        times.push(stage.restart(program)?.as_secs_f64() * 1e3);
    }
    table.add(
        id,
        &format!("start to ready: {}", program.name),
        machine::quantile(&mut times, 0.5),
        "ms",
        Limit::Most(most),
    );
    Ok(())
}
