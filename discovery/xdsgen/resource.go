package xdsgen

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Type URLs of the resources that a View makes.
const (
	ListenerType = "type.googleapis.com/envoy.config.listener.v3.Listener"
	RouteType    = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
	ClusterType  = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	EndpointType = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
	ServiceType  = "type.googleapis.com/hanse.xds.v1.Service"
	TrustType    = "type.googleapis.com/hanse.xds.v1.Trust"
	FaultsType   = "type.googleapis.com/hanse.xds.v1.Faults"
)

// Names that are not authorities.
const (
	InboundPrefix    = "hanse/inbound/"                              // + workload IP
	AddressPrefix    = "hanse/address/"                              // + an IP that is called
	GRPCServerPrefix = "grpc/server?xds.resource.listening_address=" // + ip:port
	InvalidCluster   = "hanse.invalid"                               // where the share of an invalid backendRef goes
	metadataKey      = "hanse.mesh"                                  // in typed_filter_metadata
	tlsInstance      = "spiffe"                                      // certificate provider of the bootstrap
	tlsSocket        = "envoy.transport_sockets.tls"
)

// Resource is one xDS resource, ready to be sent.
type Resource struct {
	Name     string
	Version  string // hash of Any
	Any      *anypb.Any
	Personal bool // depends on the viewer's ID, beyond its Class
}

// Resource makes the resource of that type and name for a viewer; nil where there is none, or the viewer may not have it.
// An error means that the View holds something that cannot be expressed.
func (v *View) Resource(viewer *Viewer, typeURL, name string) (*Resource, error) {
	m, personal, err := v.message(viewer, typeURL, name)
	if m == nil || err != nil {
		return nil, err
	}
	r, err := NewResource(name, m)
	if err != nil {
		return nil, err
	}
	r.Personal = personal
	return r, nil
}

// NewResource packs a message, deterministically.
func NewResource(name string, m proto.Message) (*Resource, error) {
	a, err := packed(m)
	if err != nil {
		return nil, fmt.Errorf("encode %s %q: %w", m.ProtoReflect().Descriptor().FullName(), name, err)
	}
	sum := sha256.Sum256(a.Value)
	return &Resource{Name: name, Version: hex.EncodeToString(sum[:8]), Any: a}, nil
}

// Class names what a resource may depend on beside its name: viewers of one class share it, unless it is Personal.
func (viewer *Viewer) Class(typeURL, name string) string {
	const sep = "\x00"
	switch {
	case typeURL == EndpointType:
		return string(viewer.Kind) + sep + viewer.Cluster + sep + viewer.Region + sep + viewer.Zone + sep + viewer.Network
	case typeURL == ListenerType && (strings.HasPrefix(name, InboundPrefix) || strings.HasPrefix(name, GRPCServerPrefix)):
		return string(viewer.Kind) + sep + viewer.SPIFFEID
	case typeURL == ServiceType:
		return string(viewer.Kind) + sep + viewer.Network
	case typeURL == ListenerType, typeURL == RouteType:
		return string(viewer.Kind) + sep + viewer.Namespace
	}
	return string(viewer.Kind)
}

func (v *View) message(viewer *Viewer, typeURL, name string) (m proto.Message, personal bool, err error) {
	if viewer.Kind == Gateway {
		return nil, false, nil // a gateway's table is GatewayResources
	}
	if typeURL == ServiceType {
		if s := v.service(viewer, name); s != nil {
			m = s
		}
		return m, false, nil
	}
	if typeURL == ListenerType {
		if ip, ok := strings.CutPrefix(name, InboundPrefix); ok {
			addr, err := netip.ParseAddr(ip)
			if err != nil || addr.String() != ip {
				return nil, false, nil
			}
			l, err := v.inboundListener(viewer, name, addr)
			return orNil(l), false, err
		}
		if at, ok := strings.CutPrefix(name, GRPCServerPrefix); ok {
			addr, err := netip.ParseAddrPort(at)
			if err != nil {
				return nil, false, nil
			}
			l, err := v.grpcServerListener(viewer, name, addr)
			return orNil(l), false, err
		}
	}
	if name == InvalidCluster && viewer.Kind == GRPC { // others know what to do without it
		switch typeURL {
		case ClusterType:
			return invalidCluster(), false, nil
		case EndpointType:
			return &endpointv3.ClusterLoadAssignment{ClusterName: name}, false, nil
		}
		return nil, false, nil
	}
	c, err := v.lookup(name)
	if err != nil {
		if viewer.Kind == GRPC && typeURL == ListenerType && canonical(name) {
			m, err = failingListener(name, err.Error())
			return m, false, err
		}
		return nil, false, nil // an unknown name is an answer, not an error
	}
	switch typeURL {
	case ListenerType:
		m, err = v.listener(viewer, c)
	case RouteType:
		if c.port.Protocol.IsHTTP() || viewer.Kind == GRPC {
			m, err = v.routeConfiguration(viewer, c)
		}
	case ClusterType:
		m, err = v.cluster(viewer, c)
	case EndpointType:
		m, personal, err = v.loadAssignment(viewer, c)
	}
	if err != nil {
		return nil, false, fmt.Errorf("make %s %q: %w", typeURL[strings.LastIndexByte(typeURL, '.')+1:], name, err)
	}
	return m, personal, nil
}

// orNil keeps a nil pointer from becoming a non-nil interface.
func orNil(l *listenerv3.Listener) proto.Message {
	if l == nil {
		return nil
	}
	return l
}

// packed is anypb.New with map fields in a fixed order.
func packed(m proto.Message) (*anypb.Any, error) {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return nil, err
	}
	return &anypb.Any{TypeUrl: "type.googleapis.com/" + string(m.ProtoReflect().Descriptor().FullName()), Value: b}, nil
}

// metadata holds one of our messages under typed_filter_metadata["hanse.mesh"].
func metadata(m proto.Message) (*corev3.Metadata, error) {
	a, err := packed(m)
	if err != nil {
		return nil, err
	}
	return &corev3.Metadata{TypedFilterMetadata: map[string]*anypb.Any{metadataKey: a}}, nil
}

func u32(n uint32) *wrapperspb.UInt32Value { return wrapperspb.UInt32(n) }

// duration is nil for 0.
func duration(d time.Duration) *durationpb.Duration {
	if d == 0 {
		return nil
	}
	return durationpb.New(d)
}

func ads() *corev3.ConfigSource {
	return &corev3.ConfigSource{
		ResourceApiVersion:    corev3.ApiVersion_V3,
		ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}},
	}
}

func socketAddress(ap netip.AddrPort) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address:       ap.Addr().String(),
		PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(ap.Port())},
	}}}
}
