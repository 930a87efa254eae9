"""The values of the Helm chart as types: values.yaml, its schema and the chart's README are generated from them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sonoforge_operator.api import PretrainRuntimeSpec, Toleration
from sonoforge_operator.api.fields import (
    Cidr,
    LabelValue,
    NodeSelector,
    ObjectName,
    OptionalObjectName,
    Port,
    QualifiedName,
    Quantity,
)
from sonoforge_trainer.contract import Part

Labels = Annotated[dict[QualifiedName, LabelValue], Field(max_length=64)]
Annotations = Annotated[dict[QualifiedName, str], Field(max_length=64)]
NamespaceName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Namespaces = Annotated[tuple[NamespaceName, ...], Field(max_length=256)]
Interval = Annotated[str, Field(pattern=r"^([0-9]+(ms|s|m|h))+$", max_length=16)]
Seconds = Annotated[float, Field(gt=0)]
Url = Annotated[str, Field(pattern=r"^(https?://\S+)?$", max_length=1024)]
NO_PROXY = "$(KUBERNETES_SERVICE_HOST),.svc"


class Crds(Part):
    """The CustomResourceDefinitions."""

    enabled: bool = True
    """Install and upgrade them with this release. One release of a cluster does; the others set it to false."""
    keep: bool = True
    """Leave them in the cluster when the release is uninstalled. Without them every job, runtime, suite and checkpoint
    object is deleted, and what the jobs run with them."""


class OperatorImage(Part):
    """Where an image comes from. The digest, where given, decides; the tag is then for people."""

    registry: Annotated[str, Field(pattern=r"^[a-zA-Z0-9.:/_-]*$", max_length=255)] = ""
    """Host, and path where there is one, of the registry. Empty: what the nodes take for their default."""
    repository: Annotated[str, Field(pattern=r"^[a-z0-9._/-]+$", max_length=255)] = "sonoforge/operator"
    """Name of the image."""
    tag: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]*$", max_length=128)] = ""
    """Tag. Empty: the version of the chart's application."""
    image_digest: Annotated[str, Field(alias="digest", pattern=r"^(sha256:[0-9a-f]{64})?$")] = ""
    """Digest, for example sha256:0123..., so that nobody can put another image under the same name."""


class TrainerImage(OperatorImage):
    """The image that jobs run where their PretrainRuntime names none."""

    repository: Annotated[str, Field(pattern=r"^[a-z0-9._/-]+$", max_length=255)] = "sonoforge/trainer"
    """Name of the image."""


class Resources(Part):
    """What the operator's container asks for and may not exceed."""

    requests: Annotated[dict[QualifiedName, Quantity], Field(max_length=16)] = {"cpu": "100m", "memory": "128Mi"}
    """What the scheduler keeps free for it."""
    limits: Annotated[dict[QualifiedName, Quantity], Field(max_length=16)] = {"memory": "512Mi"}
    """What it may not exceed. No limit of the CPU: a throttled operator loses its Lease."""


class Timing(Part):
    """Options of `sonoforge operator` about time. Null: the operator's own default, see docs/operations.md."""

    poll_seconds: Seconds | None = None
    """Time between two looks at the progress of a run."""
    watch_silence_seconds: Seconds | None = None
    """A watch that is silent for so long is made anew."""
    stale_seconds: Seconds | None = None
    """Not healthy where watches tell nothing for so long."""
    stuck_seconds: Seconds | None = None
    """Not healthy where a pass lasts so long, or none ends although some are due."""
    lease_seconds: Annotated[int, Field(ge=1)] | None = None
    """How long its Lease holds: after a killed node, another replica acts this much later."""
    renew_seconds: Seconds | None = None
    """It ends where it cannot renew its Lease for so long. Shorter than leaseSeconds."""
    retry_seconds: Seconds | None = None
    """Time between two tries to hold the Lease. Shorter than renewSeconds."""


class Proxy(Part):
    """Proxy on the operator's way to the API server. Coordinators are never asked through one, and jobs get none."""

    http: Url = ""
    """HTTP_PROXY."""
    https: Url = ""
    """HTTPS_PROXY."""
    no_proxy: Annotated[str, Field(max_length=4096)] = NO_PROXY
    """NO_PROXY, where one of the others is set. The default asks an API server inside the cluster without a proxy."""


class ExtraCa(Part):
    """Certificates of the hospital's own authority, for jobs that reach their storage by TLS."""

    certificates: str = ""
    """PEM text. It becomes the ConfigMap `sonoforge-ca`, key `ca.crt`, in every one of `jobNamespaces`; the default
    runtime uses it, other runtimes name it as storage.caBundle. Empty: none."""


class Peer(Part):
    """Pods of a namespace."""

    namespace: Annotated[str, Field(pattern=r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?)?$", max_length=63)] = ""
    """The namespace. Empty: any."""
    pod_labels: Labels = {}
    """Labels that the pods have. Empty: all pods of the namespace."""


class ApiServer(Part):
    """Where the API server answers, behind the Service `kubernetes`."""

    cidrs: Annotated[tuple[Cidr, ...], Field(max_length=64)] = ()
    """Its addresses, as `kubectl get endpointslices kubernetes` shows them. Empty: any address, on these ports."""
    ports: Annotated[tuple[Port, ...], Field(min_length=1, max_length=16)] = (443, 6443)
    """Its ports."""


class OperatorNetwork(Part):
    """The operator's own NetworkPolicy. Those of jobs follow from `network` of their runtime."""

    enabled: bool = True
    """Make it."""
    metrics_from: Annotated[tuple[Peer, ...], Field(max_length=16)] = (
        Peer(pod_labels={"app.kubernetes.io/name": "prometheus"}),
    )
    """Pods that may read metrics. Empty: nobody. Probes come from the node itself, which no policy stops."""
    api_server: ApiServer = ApiServer()
    """Where the API server answers."""
    dns_namespace: NamespaceName = "kube-system"
    """Namespace of the cluster's DNS."""


class Monitor(Part):
    """An object of the Prometheus operator, whose CRDs the cluster has to have."""

    enabled: bool = False
    """Make it."""
    labels: Labels = {}
    """Further labels, by which a Prometheus selects it."""


class ScrapeMonitor(Monitor):
    """How metrics are scraped."""

    interval: Interval = "30s"
    """Time between two readings."""


class Dashboard(Part):
    """A Grafana dashboard as a ConfigMap, for Grafana's sidecar."""

    enabled: bool = False
    """Make it."""
    labels: Labels = {"grafana_dashboard": "1"}
    """Labels by which the sidecar finds it."""
    annotations: Annotations = {}
    """Annotations, for example the folder."""


class Metrics(Part):
    """What watches the operator."""

    service_monitor: ScrapeMonitor = ScrapeMonitor()
    """Scrape through a Service, which is made with it."""
    pod_monitor: ScrapeMonitor = ScrapeMonitor()
    """Scrape the pods themselves. Have this or the ServiceMonitor, not both."""
    prometheus_rule: Monitor = Monitor()
    """Alerts, see files/alerts.yaml."""
    dashboard: Dashboard = Dashboard()
    """The dashboard."""


class PodDisruptionBudget(Part):
    """How many replicas a drain may take at once."""

    enabled: bool = False
    """Make one. Needs two replicas or more: with one, a drain would wait for ever."""
    max_unavailable: Annotated[int, Field(ge=1)] = 1
    """Replicas that may be away."""


class AggregatedRoles(Part):
    """ClusterRoles that extend the cluster's own `view`, `edit` and `admin`."""

    enabled: bool = True
    """Make them. One release of a cluster does; the others set it to false."""


class AdmissionPolicy(Part):
    """ValidatingAdmissionPolicies: what the rules inside the CRDs cannot see, since they do not know who asks."""

    enabled: bool = True
    """In the namespaces that are served: only the operator makes Checkpoints and writes statuses, and nobody else makes
    or relabels pods as those of a job, to which the job's NetworkPolicies would open."""
    exempt_groups: Annotated[tuple[Annotated[str, Field(pattern=r"^[^'\\]+$")], ...], Field(max_length=16)] = (
        "system:masters",
    )
    """Groups of users that are not held to them, for repairs by hand."""
    require_digests: bool = False
    """Also refuse a PretrainRuntime whose image is not given by digest. Needs `trainerImage.digest`."""


class PriorityClass(Part):
    """A PriorityClass."""

    name: ObjectName
    """Name, for `priorityClassName` of a runtime."""
    value: Annotated[int, Field(ge=-2_147_483_648, le=1_000_000_000)]
    """Higher goes first."""
    preemption_policy: Literal["PreemptLowerPriority", "Never"] = "PreemptLowerPriority"
    """Whether its pods may push others out."""
    description: str = ""
    """For whom it is."""


class DefaultRuntime(Part):
    """The PretrainRuntime of jobs that name none, in every one of `jobNamespaces`.

    Helm can make it once the cluster serves the CRDs: where they come with the same release, from the first
    `helm upgrade` on. It stays when the release goes.
    """

    enabled: bool = False
    """Make it."""
    name: ObjectName = "default"
    """Its name. `default` is what a job without runtimeRef looks for."""
    spec: PretrainRuntimeSpec = PretrainRuntimeSpec()
    """Its spec, as `kubectl explain prt.spec` tells; `queueName` is the Kueue queue of jobs that name none."""


class Values(Part):
    """Values of the chart."""

    common_labels: Labels = {}
    """Further labels of every object, but for those of pods."""
    cluster_wide: bool = False
    """Serve every namespace. Needs the rights to make a ClusterRole."""
    watch_namespaces: Namespaces = ()
    """Namespaces whose jobs are served; they have to exist. Empty: the release's own. Not together with clusterWide."""
    job_namespaces: Namespaces = ()
    """Namespaces that get the default runtime and the extra CA. Empty: the served ones; with clusterWide, none."""
    crds: Crds = Crds()
    """The CustomResourceDefinitions."""
    image: OperatorImage = OperatorImage()
    """Image of the operator."""
    trainer_image: TrainerImage = TrainerImage()
    """Image of jobs whose runtime names none."""
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] | None = None
    """When a node asks the registry for the operator's image. Null: as Kubernetes decides by the tag."""
    image_pull_secrets: Annotated[tuple[ObjectName, ...], Field(max_length=8)] = ()
    """Names of Secrets with the registry's credentials, for the operator's pod."""
    key_secret: ObjectName = "sonoforge-operator"
    """Secret whose key `key` (16 bytes or more) the tokens for coordinators follow from. You make it, see NOTES."""
    replicas: Annotated[int, Field(ge=1, le=5)] = 1
    """Replicas. One acts, the others wait for its Lease."""
    resources: Resources = Resources()
    """What the operator's container asks for and may not exceed."""
    node_selector: NodeSelector = {}
    """Labels that the operator's node must have."""
    tolerations: Annotated[tuple[Toleration, ...], Field(max_length=32)] = ()
    """Taints of nodes that its pod puts up with. It leaves a lost node after 30 s, unless they name its taints."""
    priority_class_name: OptionalObjectName = ""
    """PriorityClass of the operator's pod. Empty: the cluster's default."""
    pod_annotations: Annotations = {}
    """Annotations of the operator's pod."""
    service_account_annotations: Annotations = {}
    """Annotations of the operator's ServiceAccount."""
    timing: Timing = Timing()
    """Options of the operator about time."""
    coordinator_url: Annotated[str, Field(pattern=r"^(https?://\S+)?$", max_length=1024)] = ""
    """Where coordinators answer, with {service} and {namespace}. Empty: by the name of their Service."""
    proxy: Proxy = Proxy()
    """Proxy on the operator's way to the API server."""
    extra_ca: ExtraCa = ExtraCa()
    """Certificates of the hospital's own authority."""
    network_policy: OperatorNetwork = OperatorNetwork()
    """The operator's own NetworkPolicy."""
    metrics: Metrics = Metrics()
    """What watches the operator."""
    pod_disruption_budget: PodDisruptionBudget = PodDisruptionBudget()
    """How many replicas a drain may take at once."""
    aggregated_roles: AggregatedRoles = AggregatedRoles()
    """ClusterRoles that extend the cluster's own."""
    admission_policy: AdmissionPolicy = AdmissionPolicy()
    """ValidatingAdmissionPolicies."""
    priority_classes: Annotated[tuple[PriorityClass, ...], Field(max_length=16)] = ()
    """PriorityClasses to make, for runtimes to name."""
    default_runtime: DefaultRuntime = DefaultRuntime()
    """The PretrainRuntime of jobs that name none. Where the CRDs come with the same release, Helm can make it from the
    first `helm upgrade` on. It stays when the release goes."""
