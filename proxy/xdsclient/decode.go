package xdsclient

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/hanse-mesh/hanse/proxy"
)

// Type URLs.
const (
	listenerType = "type.googleapis.com/envoy.config.listener.v3.Listener"
	clusterType  = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	endpointType = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
	serviceType  = "type.googleapis.com/hanse.xds.v1.Service"
	trustType    = "type.googleapis.com/hanse.xds.v1.Trust"
	faultsType   = "type.googleapis.com/hanse.xds.v1.Faults"
)

// Names with a meaning.
const (
	inboundPrefix  = "hanse/inbound/" // + workload IP
	addressPrefix  = "hanse/address/" // + IP that is called
	invalidCluster = "hanse.invalid"  // where an invalid backend's share goes: status 500
	trustName      = "trust"
	faultsName     = "faults"
	metadataKey    = "hanse.mesh" // in typed_filter_metadata
)

// Bounds of what one resource may hold.
const (
	maxName      = 512 // bytes
	maxResource  = 8 << 20
	maxRoutes    = 1024
	maxChains    = 16_384 // one for each name of TLSRoutes
	maxMatchers  = 64     // headers or query parameters of a route
	maxBackends  = 256
	maxEdits     = 64 // header edits of one kind
	maxRegex     = 4096
	maxValue     = 8192 // bytes of a header, path or reason
	maxEndpoints = 100_000
	maxLevels    = 64
	maxGateways  = 64
	maxPorts     = 1024
	maxRules     = 1024 // access rules of one kind on one port
	maxPatterns  = 256  // of one rule
	maxFaults    = 64
	maxDomains   = 4096
	maxDigest    = 64   // bytes
	maxHosts     = 4096 // endpoints of a headless service
)

// outbound is a decoded outbound Listener and the xDS clusters that it leads to.
type outbound struct {
	listener *proxy.Listener
	clusters []string // sorted
}

// assignment is a decoded ClusterLoadAssignment.
type assignment struct {
	overprovisioning uint32
	levels           []proxy.Level
}

// decode makes what the Table holds out of a resource: *outbound, *proxy.Inbound, *proxy.Cluster (without levels), *assignment,
// []proxy.Target, *proxy.Service, map[string]uint64 or []proxy.Fault. Errors name the field.
func decode(typeURL, name string, a *anypb.Any, gateway bool) (any, error) {
	switch {
	case a == nil:
		return nil, errors.New("resource is missing")
	case a.TypeUrl != typeURL:
		return nil, fmt.Errorf("type_url is %q", shorten(a.TypeUrl))
	case len(a.Value) > maxResource:
		return nil, fmt.Errorf("resource has %d bytes, at most %d are read", len(a.Value), maxResource)
	case len(name) > maxName:
		return nil, fmt.Errorf("name has %d bytes, at most %d are read", len(name), maxName)
	}
	switch typeURL {
	case listenerType:
		return as(a, func(m *listenerv3.Listener) (any, error) { return decodeListener(name, m) })
	case clusterType:
		return as(a, func(m *clusterv3.Cluster) (any, error) { return decodeCluster(name, m) })
	case endpointType:
		return as(a, func(m *endpointv3.ClusterLoadAssignment) (any, error) {
			if m.ClusterName != name {
				return nil, fmt.Errorf("cluster_name is %q", shorten(m.ClusterName))
			}
			if gateway {
				return decodeTargets(m)
			}
			return decodeAssignment(m)
		})
	case serviceType:
		return as(a, decodeService)
	case trustType:
		return as(a, decodeTrust)
	case faultsType:
		return as(a, decodeFaults)
	}
	return nil, fmt.Errorf("type %q is not known", shorten(typeURL))
}

// as unpacks an Any of a known type.
func as[M any, P interface {
	*M
	proto.Message
}](a *anypb.Any, f func(P) (any, error)) (any, error) {
	m := P(new(M))
	if err := unpack(a, m); err != nil {
		return nil, err
	}
	return f(m)
}

func unpack(a *anypb.Any, m proto.Message) error {
	if want := m.ProtoReflect().Descriptor().FullName(); a.MessageName() != want {
		return fmt.Errorf("type_url is %q, want %s", shorten(a.GetTypeUrl()), want)
	}
	if err := proto.Unmarshal(a.Value, m); err != nil {
		return fmt.Errorf("decode %s: %w", m.ProtoReflect().Descriptor().Name(), err)
	}
	return nil
}

// only refuses a message in which a field beside those named is set: to ignore it would change what the message means.
func only(m proto.Message, fields ...protoreflect.Name) error {
	r := m.ProtoReflect()
	if len(r.GetUnknown()) > 0 {
		return errors.New("holds a field that this version does not know")
	}
	var err error
	r.Range(func(fd protoreflect.FieldDescriptor, _ protoreflect.Value) bool {
		if !slices.Contains(fields, fd.Name()) {
			err = fmt.Errorf("%s is not supported", fd.Name())
		}
		return err == nil
	})
	return err
}

// meta reads typed_filter_metadata["hanse.mesh"]; it reports whether there is any.
func meta(md *corev3.Metadata, m proto.Message) (bool, error) {
	a := md.GetTypedFilterMetadata()[metadataKey]
	if a == nil {
		return false, nil
	}
	if err := unpack(a, m); err != nil {
		return false, fmt.Errorf("metadata.typed_filter_metadata[%s]: %w", metadataKey, err)
	}
	return true, nil
}

func decodeProtocol(s string) (proxy.Protocol, error) {
	switch p := proxy.Protocol(s); p {
	case proxy.HTTP, proxy.HTTP2, proxy.GRPC, proxy.TCP:
		return p, nil
	}
	return "", fmt.Errorf("%q is not known", shorten(s))
}

func address(m *corev3.Address) (netip.AddrPort, error) {
	sa := m.GetSocketAddress()
	addr, err := netip.ParseAddr(sa.GetAddress())
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("%q is no IP address", shorten(sa.GetAddress()))
	}
	port := sa.GetPortValue()
	if port == 0 || port > math.MaxUint16 {
		return netip.AddrPort{}, fmt.Errorf("port_value is %d", port)
	}
	return netip.AddrPortFrom(addr.Unmap(), uint16(port)), nil
}

func clusterName(s string) error {
	if s == "" || len(s) > maxName {
		return fmt.Errorf("%q is empty or too long", shorten(s))
	}
	return nil
}

func bounded(field string, n, limit int) error {
	if n > limit {
		return fmt.Errorf("%s: %d entries, at most %d are read", field, n, limit)
	}
	return nil
}

// duration reads a duration that is not negative; nil is 0.
func duration(d *durationpb.Duration) (time.Duration, error) {
	if d == nil {
		return 0, nil
	}
	if err := d.CheckValid(); err != nil {
		return 0, err
	}
	if v := d.AsDuration(); v < 0 {
		return 0, fmt.Errorf("%s is negative", v)
	}
	return d.AsDuration(), nil
}

func percent(v float64) (uint32, error) {
	if !(v >= 0 && v <= 100) {
		return 0, errors.New(strconv.FormatFloat(v, 'g', -1, 64) + " is no percentage")
	}
	return uint32(math.Round(v)), nil
}

func firstSet(values ...*wrapperspb.UInt32Value) uint32 {
	for _, v := range values {
		if v != nil {
			return v.Value
		}
	}
	return 0
}

// shorten keeps foreign text in errors and tables small.
func shorten(s string) string {
	const limit = 256
	if len(s) <= limit {
		return s
	}
	return strings.ToValidUTF8(s[:limit], "") + "…"
}
