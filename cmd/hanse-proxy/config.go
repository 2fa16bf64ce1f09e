package main

import (
	"bytes"
	"cmp"
	"crypto/elliptic"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/go-multierror"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"sigs.k8s.io/yaml"

	"github.com/hanse-mesh/hanse/cmd/internal/daemon"
)

// Config is hanse-proxy's configuration file. Durations are Go's ("1h", "90s"). Paths are relative to the file.
type Config struct {
	Role        string `json:"role"`        // sidecar (default), gateway or agent; --role wins
	Cluster     string `json:"cluster"`     // as hansed has it
	TrustDomain string `json:"trustDomain"` // the cluster's
	Network     string `json:"network"`     // default: the cluster's name
	Region      string `json:"region"`      // where it runs: for levels
	Zone        string `json:"zone"`        // likewise
	Namespace   string `json:"namespace"`   // of the workload: short names are in it; in a pod, default: its own
	NodeID      string `json:"nodeID"`      // unique per proxy; default: from role, namespace, host name and addresses

	ControlPlane ControlPlane `json:"controlPlane"`
	StateDir     string       `json:"stateDir"` // keys, SVID, configuration; 0700, tmpfs in pods
	Socket       string       `json:"socket"`   // where the Workload API is served; default: stateDir/workload.sock, "none" for not at all
	// SocketUsers may use it, beside root and the proxy's own user: user IDs, or "any" where nobody reaches the socket who may not.
	SocketUsers SocketUsers `json:"socketUsers"`
	// SocketGroups may, too: group IDs, of which the caller has one as its primary or a supplementary group.
	SocketGroups SocketGroups `json:"socketGroups"`
	Keys         Keys         `json:"keys"` // of the SVIDs: the agent's own and the workload's

	Outbound  Outbound   `json:"outbound"`  // sidecar
	Listeners []Local    `json:"listeners"` // sidecar: one service each
	Workloads []Workload `json:"workloads"` // sidecar: what it stands before; at most one
	Inbound   Inbound    `json:"inbound"`   // sidecar
	Capture   Capture    `json:"capture"`   // sidecar
	DNS       DNS        `json:"dns"`       // sidecar
	Health    Health     `json:"health"`    // sidecar, gateway
	Gateway   Gateway    `json:"gateway"`   // gateway
	Agent     Agent      `json:"agent"`     // agent

	Admin        Listen   `json:"admin"` // loopback only; default 127.0.0.1:15020
	OTLP         OTLP     `json:"otlp"`
	Log          Log      `json:"log"`
	DrainTimeout Duration `json:"drainTimeout"` // default 30s
	Timers       Timers   `json:"timers"`       // shortened by tests; production leaves them alone
}

// SocketUsers is a list of user IDs, or "any".
type SocketUsers struct {
	Any bool
	IDs []uint32
}

// UnmarshalJSON takes [1000, 1001] or "any".
func (u *SocketUsers) UnmarshalJSON(b []byte) error {
	if string(b) == `"any"` {
		u.Any = true
		return nil
	}
	if err := json.Unmarshal(b, &u.IDs); err != nil {
		return fmt.Errorf("socketUsers: %s is neither a list of user IDs, such as [1000], nor any", b)
	}
	return nil
}

// SocketGroups is a list of group IDs.
type SocketGroups []uint32

// UnmarshalJSON takes [1000, 1001].
func (g *SocketGroups) UnmarshalJSON(b []byte) error {
	if err := json.Unmarshal(b, (*[]uint32)(g)); err != nil {
		return fmt.Errorf("socketGroups: %s is not a list of group IDs, such as [1000]", b)
	}
	return nil
}

// overflowGID is what the kernel calls every group that has no ID in this user namespace.
const overflowGID = 65534

// Keys says what keys are made. Those in stateDir serve until their next renewal.
type Keys struct {
	Curve string `json:"curve"` // P-256 (default) or P-384
}

// elliptic is the curve; validate has seen to it that there is one.
func (k Keys) elliptic() elliptic.Curve {
	if k.Curve == "P-384" {
		return elliptic.P384()
	}
	return elliptic.P256()
}

// ControlPlane says where hansed is, and how this proxy proves who it is the first time.
type ControlPlane struct {
	Identity    []string `json:"identity"`    // host:port of SPIRE Server APIs (7444)
	XDS         []string `json:"xds"`         // host:port (7445)
	TrustBundle string   `json:"trustBundle"` // file: PEM or SPIFFE bundle
	TokenFile   string   `json:"tokenFile"`   // file with the agent token, 0600
	PodToken    string   `json:"podToken"`    // in a pod, instead: file with its projected token, audience "hanse"

	// WorkloadAPI is another agent's (SPIRE's) Workload API, used instead of the four above but xds. Default: $SPIFFE_ENDPOINT_SOCKET,
	// where identity is empty.
	WorkloadAPI string `json:"workloadAPI"`
}

// Listen is one listener.
type Listen struct {
	Listen string `json:"listen"` // host:port or :port
}

// Outbound is the explicit proxy for the application.
type Outbound struct {
	Listen string `json:"listen"` // loopback; default 127.0.0.1:15001, "none" for not at all
}

// Local leads a loopback address to one service.
type Local struct {
	Listen string `json:"listen"` // loopback
	To     string `json:"to"`     // payments.shop:8080
}

// Workload is an address in the mesh and the applications behind it.
type Workload struct {
	Address string            `json:"address"` // IP, as other workloads know it; in a pod, default: its own
	HopPort uint16            `json:"hopPort"` // default 15008
	Listen  string            `json:"listen"`  // where the hop is served; default: address and hopPort
	Ports   map[string]string `json:"ports"`   // declared port → "127.0.0.1:9101" or "unix:/run/app.sock"
	AnyPort bool              `json:"anyPort"` // declared ports that ports does not name are served at address itself
}

// Inbound is how the hop is served.
type Inbound struct {
	GatewaysOnly      []string `json:"gatewaysOnly"`      // IPs; hop connections from elsewhere are refused
	ReportPeerAddress bool     `json:"reportPeerAddress"` // to the application, as header hanse-peer-address
}

// Gateway is the east-west gateway.
type Gateway struct {
	Listen   string `json:"listen"`   // default :15443
	DialFrom string `json:"dialFrom"` // IP that outgoing connections come from; default: the system's choice
}

// Agent writes files for workloads without a sidecar.
type Agent struct {
	FilesDir  string `json:"filesDir"`  // SVID, key, bundles; default stateDir/files
	Bootstrap string `json:"bootstrap"` // gRPC's bootstrap file; default filesDir/bootstrap.json, with grpc.env beside it
}

// OTLP is where spans go; without endpoint there are none.
type OTLP struct {
	Endpoint string   `json:"endpoint"` // host:port of an OTLP/gRPC collector
	Insecure bool     `json:"insecure"` // without TLS
	Sample   *float64 `json:"sample"`   // of traces that begin here; default 1
}

// Log is where and how much.
type Log struct {
	Level  string `json:"level"`  // debug, info (default), warn, error
	Access string `json:"access"` // access log: a file, "stdout" (default) or "none"
}

// Timers of the data path. Zero is the default.
type Timers struct {
	Connect   Duration `json:"connect"`   // 1s
	PingAfter Duration `json:"pingAfter"` // 1s
	DeadAfter Duration `json:"deadAfter"` // 2s
	IdleClose Duration `json:"idleClose"` // 90s
	Sync      Duration `json:"sync"`      // of identity with the server; 5s
}

// Duration reads "90s" from YAML.
type Duration struct{ time.Duration }

// UnmarshalJSON reads a duration string.
func (d *Duration) UnmarshalJSON(b []byte) error {
	v, err := time.ParseDuration(string(bytes.Trim(b, `"`)))
	if err != nil {
		return fmt.Errorf("duration %s: want a number with a unit, such as 90s or 1h30m", b)
	}
	d.Duration = v
	return nil
}

// MarshalJSON writes a duration string.
func (d Duration) MarshalJSON() ([]byte, error) { return []byte(`"` + d.String() + `"`), nil }

const (
	roleSidecar = "sidecar"
	roleGateway = "gateway"
	roleAgent   = "agent"

	none          = "none"
	maxConfigSize = 1 << 20
)

// LoadConfig reads and checks a file; role, if not empty, is the command line's. Every fault is in the error.
func LoadConfig(path, role, spiffeSocket string) (*Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxConfigSize+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if len(b) > maxConfigSize {
		return nil, fmt.Errorf("%s: larger than 1 MiB", path)
	}
	c := &Config{}
	if err := yaml.UnmarshalStrict(b, c); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	c.Role = cmp.Or(role, c.Role, roleSidecar)
	if len(c.ControlPlane.Identity) == 0 {
		c.ControlPlane.WorkloadAPI = cmp.Or(c.ControlPlane.WorkloadAPI, spiffeSocket)
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	c.fill(dir)
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

func (c *Config) fill(dir string) {
	at := func(base string, p *string) {
		if *p != "" && *p != none && *p != "stdout" && !filepath.IsAbs(*p) {
			*p = filepath.Join(base, *p)
		}
	}
	c.fillFromPod(os.Getenv)
	c.Network = cmp.Or(c.Network, c.Cluster)
	at(dir, &c.StateDir)
	if c.ControlPlane.WorkloadAPI != "" {
		c.Socket = cmp.Or(c.Socket, none)
	}
	if c.StateDir != "" {
		c.Socket = cmp.Or(c.Socket, filepath.Join(c.StateDir, "workload.sock"))
		if c.Role == roleAgent {
			c.Agent.FilesDir = cmp.Or(c.Agent.FilesDir, filepath.Join(c.StateDir, "files"))
		}
	}
	for _, p := range []*string{&c.Socket, &c.ControlPlane.TrustBundle, &c.ControlPlane.TokenFile, &c.ControlPlane.PodToken, &c.Agent.FilesDir, &c.Agent.Bootstrap, &c.Log.Access} {
		at(dir, p)
	}
	if c.Role == roleAgent && c.Agent.FilesDir != "" {
		c.Agent.Bootstrap = cmp.Or(c.Agent.Bootstrap, filepath.Join(c.Agent.FilesDir, "bootstrap.json"))
	}
	for i := range c.Workloads {
		w := &c.Workloads[i]
		w.HopPort = cmp.Or(w.HopPort, 15008)
		if a, err := netip.ParseAddr(w.Address); err == nil {
			w.Listen = cmp.Or(w.Listen, netip.AddrPortFrom(a, w.HopPort).String())
		}
		for port, to := range w.Ports {
			if path, ok := strings.CutPrefix(to, "unix:"); ok && !filepath.IsAbs(path) {
				w.Ports[port] = "unix:" + filepath.Join(dir, path)
			}
		}
	}
	c.Capture.fill()
	c.fillDNS()
	if c.Role == roleSidecar {
		c.Outbound.Listen = cmp.Or(c.Outbound.Listen, "127.0.0.1:15001")
	}
	if c.Role == roleGateway {
		c.Gateway.Listen = cmp.Or(c.Gateway.Listen, ":15443")
	}
	c.Admin.Listen = cmp.Or(c.Admin.Listen, "127.0.0.1:15020")
	c.Log.Access = cmp.Or(c.Log.Access, "stdout")
	c.DrainTimeout.Duration = cmp.Or(c.DrainTimeout.Duration, 30*time.Second)
	if c.NodeID == "" {
		host, _ := os.Hostname()
		parts := []string{c.Role, c.Cluster, c.Namespace, host}
		for _, w := range c.Workloads {
			parts = append(parts, w.Listen)
		}
		if c.Role == roleGateway {
			parts = append(parts, c.Gateway.Listen)
		}
		if len(c.Workloads) == 0 && c.Role != roleGateway {
			parts = append(parts, c.Admin.Listen)
		}
		c.NodeID = strings.Join(parts, "/")
	}
}

// Variables of the environment by which a pod tells what is known only once it runs (fieldRef). Regions and zones are Kubernetes' own labels of
// Nodes, which it copies to Pods where it can.
const (
	envPodIP        = "HANSE_POD_IP"
	envPodNamespace = "HANSE_POD_NAMESPACE"
	envPodName      = "HANSE_POD_NAME"
	envHostIP       = "HANSE_HOST_IP"
	envRegion       = "HANSE_REGION"
	envZone         = "HANSE_ZONE"
)

// fillFromPod completes what the file leaves open.
func (c *Config) fillFromPod(env func(string) string) {
	c.Region, c.Zone = cmp.Or(c.Region, env(envRegion)), cmp.Or(c.Zone, env(envZone))
	c.Namespace = cmp.Or(c.Namespace, env(envPodNamespace))
	c.Health.node = env(envHostIP)
	for i := range c.Workloads {
		c.Workloads[i].Address = cmp.Or(c.Workloads[i].Address, env(envPodIP))
	}
	if name := env(envPodName); name != "" && c.NodeID == "" {
		c.NodeID = strings.Join([]string{c.Role, c.Cluster, env(envPodNamespace), name}, "/")
	}
}

var dnsLabel = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

// Validate reports every fault together.
func (c *Config) Validate() error {
	var faults *multierror.Error
	bad := func(field, format string, args ...any) {
		faults = multierror.Append(faults, fmt.Errorf("%s: %s", field, fmt.Sprintf(format, args...)))
	}
	if c.Role != roleSidecar && c.Role != roleGateway && c.Role != roleAgent {
		bad("role", "%q: want sidecar, gateway or agent", c.Role)
	}
	if !dnsLabel.MatchString(c.Cluster) {
		bad("cluster", "%q is not a DNS label (lower-case letters, digits and -, at most 63)", c.Cluster)
	}
	if _, err := spiffeid.TrustDomainFromString(c.TrustDomain); err != nil {
		bad("trustDomain", "%q: %v", c.TrustDomain, err)
	}
	if c.Role == roleSidecar && !dnsLabel.MatchString(c.Namespace) {
		bad("namespace", "%q is not a DNS label: say in which namespace the workload is", c.Namespace)
	}
	if c.StateDir == "" {
		bad("stateDir", "missing: say where keys and configuration are kept")
	}
	c.validateControlPlane(bad)
	if c.Role == roleSidecar {
		c.validateSidecar(bad)
	} else if len(c.Workloads) > 0 || len(c.Listeners) > 0 || c.Outbound.Listen != "" || c.Capture.Enabled || len(c.DNS.Listen) > 0 || c.Role == roleAgent && c.Health.Listen != "" {
		bad("role", "%s has no outbound, listeners, workloads, capture, dns or health", c.Role)
	}
	if c.Role == roleGateway {
		hostPort(bad, "gateway.listen", c.Gateway.Listen)
		c.validateHealth(bad)
		if c.Gateway.DialFrom != "" {
			if _, err := netip.ParseAddr(c.Gateway.DialFrom); err != nil {
				bad("gateway.dialFrom", "%q is not an IP address", c.Gateway.DialFrom)
			}
		}
	}
	if err := daemon.CheckLoopback(c.Admin.Listen); err != nil {
		bad("admin.listen", "%v", err)
	}
	if c.OTLP.Endpoint != "" {
		hostPort(bad, "otlp.endpoint", c.OTLP.Endpoint)
	}
	if s := c.OTLP.Sample; s != nil && (*s < 0 || *s > 1) {
		bad("otlp.sample", "%v is not between 0 and 1", *s)
	}
	if _, err := daemon.ParseLevel(c.Log.Level); err != nil {
		bad("log.level", "%v", err)
	}
	for field, d := range map[string]time.Duration{"drainTimeout": c.DrainTimeout.Duration, "timers.connect": c.Timers.Connect.Duration,
		"timers.pingAfter": c.Timers.PingAfter.Duration, "timers.deadAfter": c.Timers.DeadAfter.Duration, "timers.idleClose": c.Timers.IdleClose.Duration, "timers.sync": c.Timers.Sync.Duration} {
		if d < 0 {
			bad(field, "%s is negative", d)
		}
	}
	if faults.ErrorOrNil() == nil {
		return nil
	}
	faults.ErrorFormat = func(errs []error) string {
		if len(errs) == 1 {
			return errs[0].Error()
		}
		return fmt.Sprintf("%d faults:\n  %s", len(errs), strings.ReplaceAll(errors.Join(errs...).Error(), "\n", "\n  "))
	}
	return faults
}

type report func(field, format string, args ...any)

func hostPort(bad report, field, address string) {
	if _, port, err := net.SplitHostPort(address); err != nil || port == "" {
		bad(field, "%q is not host:port", address)
	}
}

func (c *Config) validateControlPlane(bad report) {
	cp := &c.ControlPlane
	if len(cp.XDS) == 0 {
		bad("controlPlane.xds", "missing: the addresses of hansed's port 7445")
	}
	for i, a := range cp.XDS {
		hostPort(bad, fmt.Sprintf("controlPlane.xds[%d]", i), a)
	}
	if cp.WorkloadAPI != "" {
		if len(cp.Identity) > 0 {
			bad("controlPlane", "identity and workloadAPI exclude each other")
		}
		if c.Socket != none {
			bad("socket", "with another agent's Workload API none is served here")
		}
		if c.Keys.Curve != "" {
			bad("keys.curve", "with another agent's Workload API that agent makes the keys: remove it, and set it there")
		}
		return
	}
	if k := c.Keys.Curve; k != "" && k != "P-256" && k != "P-384" {
		bad("keys.curve", "%q is not one of P-256, P-384", k)
	}
	if slices.Contains(c.SocketGroups, overflowGID) {
		bad("socketGroups", "%d stands for any group of other user namespaces: give the socket's users a group of their own", overflowGID)
	}
	if field := c.socketField(); field != "" {
		switch dir, err := filepath.Rel(c.StateDir, c.Socket); {
		case c.Socket == none:
			bad(field, "there is no socket: remove it, or give socket a path")
		case c.SocketUsers.Any && len(c.SocketGroups) > 0:
			bad("socketGroups", "socketUsers any lets in whoever reaches the socket: remove one of the two")
		case err == nil && filepath.IsLocal(dir):
			bad(field, "socket is %s, and nobody else gets into stateDir; give socket a path outside of it, such as /run/hanse/workload.sock", c.Socket)
		}
	}
	if len(cp.Identity) == 0 {
		bad("controlPlane.identity", "missing: the addresses of hansed's port 7444, or workloadAPI")
	}
	if cp.PodToken != "" && (cp.TokenFile != "" || c.Cluster == "") {
		bad("controlPlane.podToken", "it needs cluster, the name that hansed has for it, and excludes tokenFile")
	}
	for i, a := range cp.Identity {
		hostPort(bad, fmt.Sprintf("controlPlane.identity[%d]", i), a)
	}
}

// socketField is the field that lets others use the socket, or "".
func (c *Config) socketField() string {
	switch {
	case c.SocketUsers.Any || len(c.SocketUsers.IDs) > 0:
		return "socketUsers"
	case len(c.SocketGroups) > 0:
		return "socketGroups"
	}
	return ""
}

func (c *Config) validateSidecar(bad report) {
	loopback := func(field, address string) {
		if ap, err := netip.ParseAddrPort(address); err != nil {
			bad(field, "%q is not ip:port", address)
		} else if !ap.Addr().IsLoopback() {
			bad(field, "%q is not a loopback address: whoever reaches it calls with this workload's identity", address)
		}
	}
	if c.Outbound.Listen != none {
		loopback("outbound.listen", c.Outbound.Listen)
	}
	for i, l := range c.Listeners {
		loopback(fmt.Sprintf("listeners[%d].listen", i), l.Listen)
		if l.To == "" {
			bad(fmt.Sprintf("listeners[%d].to", i), "missing: a service, such as payments.shop:8080")
		}
	}
	if len(c.Workloads) > 1 {
		bad("workloads", "one sidecar has one identity: run one for each workload")
	}
	for i, w := range c.Workloads {
		field := fmt.Sprintf("workloads[%d]", i)
		if a, err := netip.ParseAddr(w.Address); err != nil || a.IsUnspecified() {
			bad(field+".address", "%q is not the IP address of a workload", w.Address)
			continue
		}
		hostPort(bad, field+".listen", w.Listen)
		if _, err := c.apps(); err != nil {
			bad(field+".ports", "%v", err)
		}
	}
	c.validateDNS(bad)
	c.validateHealth(bad)
	if c.Capture.Enabled {
		c.validateCapture(bad)
	}
	for i, g := range c.Inbound.GatewaysOnly {
		if _, err := netip.ParseAddr(g); err != nil {
			bad(fmt.Sprintf("inbound.gatewaysOnly[%d]", i), "%q is not an IP address", g)
		}
	}
}

// apps returns the applications of the workload by declared port.
func (c *Config) apps() (map[uint16]string, error) {
	apps := map[uint16]string{}
	for _, w := range c.Workloads {
		for port, to := range w.Ports {
			var n uint16
			if _, err := fmt.Sscanf(port, "%d", &n); err != nil || n == 0 || fmt.Sprint(n) != port {
				return nil, fmt.Errorf("%q is not a port", port)
			}
			if path, ok := strings.CutPrefix(to, "unix:"); ok && path != "" {
				apps[n] = to
				continue
			}
			if _, p, err := net.SplitHostPort(to); err != nil || p == "" {
				return nil, fmt.Errorf("port %s: %q is neither host:port nor unix:/path", port, to)
			}
			apps[n] = to
		}
	}
	return apps, nil
}
