// Package federationpb is what one cluster exports to another, and what is stored of members, as protobuf.
//
// Foreign bytes of these types become ours in package federation, and nowhere else.
package federationpb
