"""Secret values are removed from a job before it is passed on, and all other values stay."""

import json

from hypothesis import given
from hypothesis import strategies as st

from grounding.api.redaction import HIDDEN, without_secrets

TEMPLATE = {
    "spec": {
        "containers": [
            {
                "name": "main",
                "image": "egm:1",
                "args": ["--key", "hunter2"],
                "env": [
                    {"name": "OPENAI_API_KEY", "value": "hunter2"},
                    {"name": "OTHER", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
                ],
            }
        ]
    }
}


def test_values_of_an_environment_and_passwords_of_urls_are_hidden():
    job = {"spec": {"podTemplate": TEMPLATE, "tracking": {"mlflow": {"trackingUri": "https://user:hunter2@host/x"}}}}
    shown = without_secrets(job)
    assert "hunter2" not in json.dumps(shown)
    container = shown["spec"]["podTemplate"]["spec"]["containers"][0]
    assert container["image"] == "egm:1" and container["env"][0] == {"name": "OPENAI_API_KEY", "value": HIDDEN}
    assert container["env"][1]["valueFrom"] == {"secretKeyRef": {"name": "s", "key": "k"}}
    assert shown["spec"]["tracking"]["mlflow"]["trackingUri"] == f"https://{HIDDEN}@host/x"


@given(
    st.recursive(
        st.none() | st.integers() | st.text("abc/:"), lambda x: st.lists(x) | st.dictionaries(st.text("abc"), x)
    )
)
def test_anything_else_is_left_as_it_is(document):
    assert without_secrets(document) == document


@given(
    st.recursive(
        st.none() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.sampled_from(["env", "spec", "value"]), x)
    )
)
def test_any_shape_of_a_template_is_survived(template):
    without_secrets({"podTemplate": template})
