package inject

import (
	"fmt"

	"sigs.k8s.io/yaml"

	"github.com/hanse-mesh/hanse/proxy/probe"
)

// The sidecar's configuration file, as cmd/hanse-proxy reads it; a test there holds both together.
type (
	proxyConfig struct {
		Role         string       `json:"role"`
		Cluster      string       `json:"cluster"`
		TrustDomain  string       `json:"trustDomain"`
		Network      string       `json:"network"`
		ControlPlane controlPlane `json:"controlPlane"`
		StateDir     string       `json:"stateDir"`
		Socket       string       `json:"socket"`
		SocketUsers  string       `json:"socketUsers,omitempty"`
		Keys         keys         `json:"keys,omitzero"`
		Workloads    []workload   `json:"workloads"`
		Capture      capturing    `json:"capture"`
		Health       health       `json:"health"`
		Log          logging      `json:"log"`
	}
	controlPlane struct {
		Identity    []string `json:"identity,omitempty"`
		XDS         []string `json:"xds"`
		TrustBundle string   `json:"trustBundle,omitempty"`
		PodToken    string   `json:"podToken,omitempty"`
		WorkloadAPI string   `json:"workloadAPI,omitempty"`
	}
	keys struct {
		Curve string `json:"curve"`
	}
	workload struct {
		AnyPort bool `json:"anyPort"`
	}
	capturing struct {
		Enabled  bool     `json:"enabled"`
		DNS      bool     `json:"dns"`
		Outbound outbound `json:"outbound,omitzero"`
		Inbound  inbound  `json:"inbound,omitzero"`
	}
	outbound struct {
		ExcludePorts []string `json:"excludePorts,omitempty"`
		Exclude      []string `json:"exclude,omitempty"`
	}
	inbound struct {
		Mode         string   `json:"mode,omitempty"`
		ExemptPorts  []uint16 `json:"exemptPorts,omitempty"`
		ExcludePorts []string `json:"excludePorts,omitempty"`
	}
	logging struct {
		Level string `json:"level"`
	}
)

// health is where the sidecar answers the kubelet, for itself and for the application: the kubelet has no identity, and what it asks the
// application is asked by the sidecar, in the Pod.
type health struct {
	Listen string                 `json:"listen"`
	Checks map[string]probe.Check `json:"checks,omitempty"` // by path
}

func (v *Values) config(s *settings, checks map[string]probe.Check) (string, error) {
	c := proxyConfig{
		Role: "sidecar", Cluster: v.Cluster, TrustDomain: v.TrustDomain, Network: v.Network,
		ControlPlane: controlPlane{Identity: v.Identity, XDS: v.XDS, TrustBundle: rootDir + "/" + rootKey, PodToken: tokenDir + "/token"},
		StateDir:     stateDir + "/state", Socket: "none", Workloads: []workload{{AnyPort: true}},
		Capture: capturing{Enabled: true, DNS: true, Outbound: outbound{ExcludePorts: s.skipOut, Exclude: s.skipIPs}, Inbound: inbound{ExemptPorts: s.exempt}},
		Health:  health{Listen: fmt.Sprintf(":%d", healthPort), Checks: checks}, Log: logging{Level: v.LogLevel},
	}
	if len(s.skipIn) > 0 {
		c.Capture.Inbound.ExcludePorts = append([]string{"22"}, s.skipIn...)
	}
	if s.permissive {
		c.Capture.Inbound.Mode = "permissive"
	}
	switch {
	case v.SPIRE.Used(): // its agent serves the application, too, and makes the keys
		c.ControlPlane = controlPlane{XDS: v.XDS, WorkloadAPI: v.apiSocket()}
	case s.workloadAPI:
		c.Socket, c.SocketUsers = apiDir+"/workload.sock", "any" // the volume is this Pod's, whose containers have users of their own
	}
	if v.KeyCurve != "P-256" && !v.SPIRE.Used() { // the default, also of proxies older than the field
		c.Keys.Curve = v.KeyCurve
	}
	if s.logLevel != "" {
		c.Log.Level = s.logLevel
	}
	b, err := yaml.Marshal(c)
	return string(b), err
}
