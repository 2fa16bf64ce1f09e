// Package xdspb holds the few xDS messages of our own: endpoint and route metadata, the trust and faults resources.
//
// docs/xds.md says how they ride on Envoy's messages. Both ends of the stream use it: discovery/xdsgen and proxy/xdsclient.
package xdspb
