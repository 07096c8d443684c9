#!/usr/bin/env python3
"""Writes targetgroupbinding/README.md from the comments of values.yaml; --check only compares."""
import json
import pathlib
import re
import sys

CHART = pathlib.Path(__file__).resolve().parent / "targetgroupbinding"
HEAD = """# Chart `targetgroupbinding`

<!-- Made from values.yaml by charts/readme.py: change the comments there. -->

Installs the CustomResourceDefinition `targetgroupbindings.elbv2.k8s.aws`, the admission and conversion webhook
(`tgb-webhook`), and the controller (`tgb-controller`). `docs/install.md` has the way from an empty account,
`docs/migration.md` the one from the AWS Load Balancer Controller, `docs/uninstall.md` the one back.

    helm install tgb charts/targetgroupbinding --namespace tgb-system --create-namespace --wait \\
      --set clusterName=my-cluster,image.registry=123456789012.dkr.ecr.eu-central-1.amazonaws.com

## Values

| value | default | what |
|---|---|---|
"""


def rows(text):
    """(path, default, comment) of every leaf. Sections are keys without a value of their own."""
    stack, comment, out = [], [], []
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if not line.strip():
            comment = []
            continue
        if line.strip().startswith("#"):
            comment.append(line.strip().lstrip("#").strip())
            continue
        match = re.match(r"^( *)([A-Za-z]+):(?: (.*))?$", line)
        if not match:
            sys.exit(f"values.yaml:{number + 1}: readme.py can't read this line")
        indent, key, value = len(match[1]) // 2, match[2], match[3]
        if indent > len(stack):
            continue  # inside the default of a value that has its comment above
        stack = stack[:indent]
        path = ".".join(stack + [key])
        if value is None and section(lines, number):
            stack.append(key)
            comment = []
            continue
        if not comment:
            sys.exit(f"values.yaml:{number + 1}: {path} has no comment")
        out.append((path, default(lines, number, indent, value), " ".join(comment)))
        comment = []
    return out


def section(lines, number):
    """Do the keys below have comments of their own?"""
    for line in lines[number + 1:]:
        if line.strip():
            return line.strip().startswith("#") or bool(re.match(r"^ *[A-Za-z]+:$", line))
    return False


def default(lines, number, indent, value):
    """The default, on one line."""
    if value is not None:
        return value
    parts = []
    for line in lines[number + 1:]:
        if not line.startswith("  " * (indent + 1)):
            break
        parts.append(line.strip())
    return "{" + ", ".join(parts) + "}"


def check_schema():
    """values.schema.json, kept by hand for its patterns, knows exactly the values that there are."""
    schema = json.loads((CHART / "values.schema.json").read_text())

    def leaves(node, path):
        known = node.get("properties")
        if not known:
            return {path}
        if node.get("additionalProperties") is not False:
            sys.exit(f"values.schema.json: {path or 'the top'} admits keys that do not exist")
        return set().union(*(leaves(child, f"{path}.{key}".lstrip(".")) for key, child in known.items()))

    there = {path for path, _, _ in rows((CHART / "values.yaml").read_text())}
    known = leaves(schema, "")
    inside = {k for k in known if any(k.startswith(t + ".") for t in there)}
    for path in sorted(there - known - {t for t in there if any(k.startswith(t + ".") for k in known)}):
        sys.exit(f"values.schema.json does not know {path}")
    for path in sorted(known - there - inside - {"global", "enabled"}):  # those are helm's, of a parent chart
        sys.exit(f"values.schema.json knows {path}, which values.yaml does not have")


def main():
    text = HEAD
    for path, value, comment in rows((CHART / "values.yaml").read_text()):
        cell = comment.replace("|", "\\|")
        text += f"| `{path}` | `{value}` | {cell} |\n"
    check_schema()
    target = CHART / "README.md"
    if "--check" in sys.argv[1:]:
        if not target.exists() or target.read_text() != text:
            sys.exit(f"{target} is not what values.yaml says: run charts/readme.py")
        return
    target.write_text(text)


main()
