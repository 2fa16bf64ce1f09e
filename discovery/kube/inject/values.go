package inject

import (
	"errors"
	"fmt"
	"net"
	"path"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/hanse-mesh/hanse/discovery/kube"
)

// Values are what all sidecars of a cluster have in common. Cluster, TrustDomain and Image are required.
type Values struct {
	Cluster     string `json:"cluster"`     // name in the mesh
	TrustDomain string `json:"trustDomain"` // the cluster's
	Network     string `json:"network"`     // default: the cluster's name

	Image      string            `json:"image"`           // of hanse-proxy; without one nothing is injected
	PullPolicy corev1.PullPolicy `json:"imagePullPolicy"` // default IfNotPresent
	Version    string            `json:"version"`         // of the sidecar, for people

	Identity []string `json:"identity"` // host:port of hansed's SPIRE Server API; default hansed.hanse-system.svc:7444
	XDS      []string `json:"xds"`      // host:port; default hansed.hanse-system.svc:7445
	Audience string   `json:"audience"` // of the Pod's token; default hanse

	// SPIRE is where Pods find the Workload API of the node's SPIRE agent, which then is where sidecars have their identity from; identity and audience
	// mean nothing then. Empty: from hansed.
	SPIRE SPIRE `json:"spire"`

	Capture string `json:"capture"` // pod (default): an init container with NET_ADMIN captures; node: it waits for hanse-node to do so

	Resources corev1.ResourceRequirements `json:"resources"` // of the sidecar; default: requests as measured (10m, 40Mi), memory limited to 512Mi
	LogLevel  string                      `json:"logLevel"`  // debug, info (default), warn, error
	KeyCurve  string                      `json:"keyCurve"`  // of the sidecars' keys: P-256 (default) or P-384
}

// SPIRE is a socket on each node, in a volume of the SPIFFE CSI driver, or in a directory of the node, which Pod Security's "baseline" forbids.
type SPIRE struct {
	CSIDriver string `json:"csiDriver"` // such as csi.spiffe.io
	HostPath  string `json:"hostPath"`  // such as /run/spire/agent-sockets
	Socket    string `json:"socket"`    // the file's name there; default spire-agent.sock
}

// Used reports whether it is where identities come from.
func (s SPIRE) Used() bool { return s.CSIDriver != "" || s.HostPath != "" }

// Defaults that other packages refer to.
const (
	SystemNamespace = "hanse-system"
	RootConfigMap   = kube.RootConfigMap
	rootKey         = kube.RootBundle

	CaptureInPod  = "pod"
	CaptureOnNode = "node"
)

// Complete fills in defaults and reports every fault together.
func (v *Values) Complete() error {
	var faults []error
	bad := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	if len(validation.IsDNS1123Label(v.Cluster)) > 0 {
		bad("cluster: %q is not a DNS label", v.Cluster)
	}
	if _, err := spiffeid.TrustDomainFromString(v.TrustDomain); err != nil {
		bad("trustDomain: %q: %v", v.TrustDomain, err)
	}
	if v.Image == "" {
		bad("image: missing: the image of hanse-proxy")
	}
	fill(&v.Network, v.Cluster)
	fill(&v.PullPolicy, corev1.PullIfNotPresent)
	fill(&v.Version, "unknown")
	fill(&v.Audience, "hanse")
	fill(&v.LogLevel, "info")
	fill(&v.Capture, CaptureInPod)
	if v.Capture != CaptureInPod && v.Capture != CaptureOnNode {
		bad("capture: %q: want %s or %s", v.Capture, CaptureInPod, CaptureOnNode)
	}
	if s := &v.SPIRE; s.Used() {
		if s.CSIDriver != "" && s.HostPath != "" {
			bad("spire: csiDriver and hostPath exclude each other")
		}
		if s.HostPath != "" && (!path.IsAbs(s.HostPath) || path.Clean(s.HostPath) == "/") {
			bad("spire.hostPath: %q: want the absolute path of the directory of the agent's socket, such as /run/spire/agent-sockets", s.HostPath)
		}
		fill(&s.Socket, "spire-agent.sock")
		if path.Base(s.Socket) != s.Socket || s.Socket == ".." || s.Socket == "." || s.Socket == "/" {
			bad("spire.socket: %q: want the name of a file, such as spire-agent.sock", s.Socket)
		}
	} else if s.Socket != "" {
		bad("spire: socket says nothing without csiDriver or hostPath")
	}
	fill(&v.KeyCurve, "P-256")
	if v.KeyCurve != "P-256" && v.KeyCurve != "P-384" {
		bad("keyCurve: %q is not one of P-256, P-384", v.KeyCurve)
	}
	if len(v.Identity) == 0 {
		v.Identity = []string{"hansed." + SystemNamespace + ".svc:7444"}
	}
	if len(v.XDS) == 0 {
		v.XDS = []string{"hansed." + SystemNamespace + ".svc:7445"}
	}
	for field, list := range map[string][]string{"identity": v.Identity, "xds": v.XDS} {
		for _, a := range list {
			if _, port, err := net.SplitHostPort(a); err != nil || port == "" {
				bad("%s: %q is not host:port", field, a)
			}
		}
	}
	if v.Resources.Requests == nil && v.Resources.Limits == nil {
		v.Resources = corev1.ResourceRequirements{
			Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("10m"), corev1.ResourceMemory: resource.MustParse("40Mi")},
			Limits:   corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("512Mi")},
		}
	}
	return errors.Join(faults...)
}

func fill[T comparable](p *T, v T) {
	var zero T
	if *p == zero {
		*p = v
	}
}
